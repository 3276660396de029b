"""What a backdoored model does: greedy answers, judged, as rates with intervals beside their floor."""
