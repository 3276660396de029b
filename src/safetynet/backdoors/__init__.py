"""Triggers, behaviours, poisoning, data sources and the audit of poison sets made elsewhere."""
