"""What every other package may use: errors, rank-aware logging, atomic files.  Imports nothing of megaroute."""
