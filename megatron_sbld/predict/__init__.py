"""`megatron-sbld predict`: what an iteration will take on a given cluster, and what dropping layers gains there.

A model, not a measurement. hardware.py has the data sheets, cost.py the seconds of each part, simulate.py the
pipeline's schedule, iteration.py puts an iteration together from drawn decisions, memory.py counts bytes, gain.py
calibrates and predicts, propose.py searches placements of the layers, report.py and plots.py present, command.py is the
command. Neither torch nor Megatron is needed.
"""
