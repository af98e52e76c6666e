"""Other servers, measured by the same client under the same load, where they are installed."""
