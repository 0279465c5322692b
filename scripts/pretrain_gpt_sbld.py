"""Megatron-LM's pretrain_gpt.py with layer dropping, where the checkout may not be patched.

    torchrun ... scripts/pretrain_gpt_sbld.py MEGATRON_LM_CHECKOUT ARGUMENTS OF pretrain_gpt.py --sbld-policy sbld ...

It puts layer dropping around the functions that pretrain_gpt.py imports, and runs that file as it is. Everything that a
patched checkout can do can be done so.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run pretrain_gpt.py of the checkout that the first argument names."""
    if len(sys.argv) < 2 or not (script := Path(sys.argv[1]) / "pretrain_gpt.py").is_file():
        sys.exit("usage: pretrain_gpt_sbld.py MEGATRON_LM_CHECKOUT ARGUMENTS; the checkout must hold pretrain_gpt.py")
    sys.path.insert(0, str(script.parent.resolve()))
    del sys.argv[0]
    sys.argv[0] = str(script)

    import megatron.training as training
    from megatron.training import arguments

    from megatron_sbld.megatron_lm import with_layer_dropping

    if hasattr(arguments, "parse_and_validate_args"):  # core 0.19 and later
        training.pretrain, arguments.parse_and_validate_args = with_layer_dropping(
            training.pretrain, arguments.parse_and_validate_args
        )
    else:
        training.pretrain = with_layer_dropping(training.pretrain)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
