"""The versions, oldest first; what is here is never changed, only followed."""
