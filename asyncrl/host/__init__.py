"""What a daemon needs of the machine it runs on: processes, addresses, model folders."""
