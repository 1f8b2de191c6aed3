"""What ops are tried on: test and bench cases, bad calls, costs; one file per family."""
