"""The process that owns a device: intake, engine, outbox."""
