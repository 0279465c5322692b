"""`python -m megatron_sbld` is the `megatron-sbld` command, for torchrun's -m."""

from megatron_sbld.cli.main import main

if __name__ == "__main__":
    main()
