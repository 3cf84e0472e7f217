"""What keeps a run going: supervisors, pulses, verdicts, generations. None of it knows what is trained."""
