"""The contract between gateways, workers and control: names, messages, scripts, settings."""
