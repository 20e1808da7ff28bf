"""What a device clears, family by family: checks that the reference need not make again."""
