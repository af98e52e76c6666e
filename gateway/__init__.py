"""The stateless HTTP edge: validates, limits, enqueues and relays token streams."""
