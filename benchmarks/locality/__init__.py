"""LocMoE on an emulated cluster: the competitors, what ranks measure, and the report."""
