"""Short programs to begin from; README.md beside this file has the command of each."""
