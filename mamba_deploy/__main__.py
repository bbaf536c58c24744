"""``python -m mamba_deploy`` is the command ``mamba-deploy``."""

from mamba_deploy.cli import main

if __name__ == "__main__":
    main(prog_name="mamba-deploy")
