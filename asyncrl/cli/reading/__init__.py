"""Commands that read a run that was made: report, watch, compare, inspect, replay, what-if."""
