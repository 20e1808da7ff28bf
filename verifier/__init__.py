"""Checks a proof, keeps the record, signs the verdict."""
