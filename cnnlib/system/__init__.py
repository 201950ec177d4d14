"""What the operating system gives and takes: cores, memory limits, signals, child processes."""
