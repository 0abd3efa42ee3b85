"""Any run, whatever it trains: settings, preparation, execution, its folder, callbacks, checkpoints and resuming."""
