"""What a run is: frozen, validated once, dumped into the run folder."""
