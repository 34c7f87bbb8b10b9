"""Runs with identity and lineage, studies, the measure of a speed-up, the report."""
