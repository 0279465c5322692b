"""Megatron-LM's pretrain_gpt.py with layer dropping, where the checkout may not be patched.

    torchrun ... scripts/pretrain_gpt_sbld.py MEGATRON_LM_CHECKOUT ARGUMENTS OF pretrain_gpt.py --sbld-policy sbld ...
    torchrun ... scripts/pretrain_gpt_sbld.py MEGATRON_LM_CHECKOUT/pretrain_hybrid.py ITS ARGUMENTS ...

It puts layer dropping around the functions that pretrain_gpt.py, or the script that is named, imports, and runs that
file as it is. Everything that a patched checkout can do can be done so.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run pretrain_gpt.py of the checkout that the first argument names, or the script that it names."""
    script = Path(sys.argv[1] if len(sys.argv) > 1 else "")
    if script.suffix != ".py":
        script /= "pretrain_gpt.py"
    if len(sys.argv) < 2 or not script.is_file():
        sys.exit(
            "usage: pretrain_gpt_sbld.py MEGATRON_LM_CHECKOUT ARGUMENTS, or the path of a script in it; it must "
            "hold pretrain_gpt.py"
        )
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
