"""What a proof is: pure values, formats, hashes and rules."""
