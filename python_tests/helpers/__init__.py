"""What tests share: models, adapters, training loops, references written a second time, other devices and processes."""
