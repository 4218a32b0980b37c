"""`python -m ddpm_dist.commands NAME …`: a program by its name, where ddpm_dist can be imported, installed or not."""

from ddpm_dist.commands import scripts

if __name__ == "__main__":
    scripts.by_name()
