"""What this machine has for megafuse, what is broken, and the command that repairs it."""
