"""The native CPU backend: C++ that is compiled on first use, and what calls it."""
