"""LocMoE on an emulated cluster: who competes, what ranks measure, how it is told."""
