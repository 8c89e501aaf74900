"""End-to-end training throughput on the real lengths of any data set, any loss, any layout."""
