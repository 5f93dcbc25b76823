"""Verify the GPU: know what this machine can do before you give it work.

Run:    uv run src/basics/01_verify_gpu.py
Needs:  nothing
Makes:  nothing
Expect: product = correct

Three parts must agree before a GPU helps you: the card, its driver, and a PyTorch built for that
driver. This lesson asks each of them, then multiplies two matrices to see that the answer is right.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}  # for each CUDA, says NVIDIA's documentation


# LOOK: the card on its bus, the driver, and the CUDA that PyTorch was built for.
def has_card():
    """Look for an NVIDIA display device (vendor 10de, class 03) where Linux lists the PCI bus."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        if vendor.startswith("0x10de") and kind.startswith("0x03"):
            return True
    return False


def find_driver():
    """Return the driver's version, or None, and what nvidia-smi says when it is there but fails."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20)
        return answer.stdout.split()[0], None
    except FileNotFoundError:
        return None, None
    except subprocess.CalledProcessError as error:
        return None, (error.stdout + error.stderr).strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired, IndexError) as error:
        return None, f"no answer ({type(error).__name__})"


def show_build(driver):
    print("PyTorch version:   ", torch.__version__)
    print("Built for CUDA:    ", torch.version.cuda or "no")
    print("NVIDIA driver:     ", driver or "none found")
    print("CUDA available:    ", torch.cuda.is_available())


# DEVICES: every GPU that PyTorch can use, and what it offers.
def show_devices():
    print("CUDA device count: ", torch.cuda.device_count())
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"GPU {index}:              {gpu.name}")
        print(f"  memory:            {gpu.total_memory / 2**30:.1f} GiB")
        print(f"  compute capability {gpu.major}.{gpu.minor}")
        print(f"  multiprocessors:   {gpu.multi_processor_count}")
    if DEVICE.type == "cuda":
        print("bfloat16 in hardware:", torch.cuda.is_bf16_supported(including_emulation=False))
    print("Device in use:     ", DEVICE)


# ADVICE: a card that is there but cannot be used must not pass for "no GPU".
def find_problem(driver, failure, card):
    """Return one sentence on why the GPU that is here cannot be used, or None."""
    if DEVICE.type != "cpu":
        return None
    if failure:
        return f"nvidia-smi is here but fails: {failure}. Reboot; then check the driver's installation."
    if driver is None:
        return "A GPU is here, but no driver. Type: scripts/setup_rhel9.sh" if card else None
    if torch.version.cuda is None:
        return (
            "A GPU is here, but this PyTorch was built without CUDA. "
            "Type: uv sync --reinstall-package torch"
        )
    needed = OLDEST_DRIVER.get(torch.version.cuda.split(".")[0], 0)
    if int(driver.split(".")[0]) < needed:
        return (
            f"Driver {driver} is too old for CUDA {torch.version.cuda}, which needs {needed} or newer. "
            "Update the driver (scripts/setup_rhel9.sh says how)."
        )
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={visible} may hide the GPU. Type: unset CUDA_VISIBLE_DEVICES"
    try:
        torch.cuda.init()
        return "The driver answers, but PyTorch finds no GPU. Reboot, then run this lesson again."
    except Exception as error:  # the CUDA runtime's own words are the best clue that is left
        return f"The driver answers, but CUDA does not start: {str(error).splitlines()[0]}"


# CHECK: one product, compared with the CPU's answer.
def check_product():
    torch.manual_seed(42)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    try:
        product = (a.to(DEVICE) @ b.to(DEVICE)).cpu()
    except RuntimeError as error:  # for instance a card that this build has no kernels for
        sys.exit(f"{DEVICE} cannot multiply two matrices: {str(error).splitlines()[0]}")
    return torch.allclose(product, a @ b, atol=1e-3)


def main():
    driver, failure = find_driver()
    show_build(driver)
    show_devices()
    if problem := find_problem(driver, failure, has_card()):
        sys.exit(problem)
    if DEVICE.type == "cpu":
        print("No GPU here: every lesson runs on the CPU too, only slower.")
    print(f"Result: device = {DEVICE}, product = {'correct' if check_product() else 'wrong'}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="changes nothing: this lesson is instant")
    cli.parse_args()
    main()
