"""The ops: one row each, saying which input rows an output row needs and how to check it.

A row never sees more than the opened rows: `reach` is the same function for prover and verifier,
so what it names is what gets opened.
"""
