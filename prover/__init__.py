"""Makes a proof: runs a model, commits to its trace, opens what is challenged."""
