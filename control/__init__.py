"""The arq worker beside the token path: janitor and settling."""
