"""Verify the GPU: see which device your computer offers, and let it multiply two matrices.

Run:    uv run src/basics/01_verify_gpu.py
Needs:  nothing
Makes:  nothing
Expect: product = correct

PyTorch works on every CPU. A GPU is faster, but needs three parts that fit together: a graphics
card, its driver, and a PyTorch that was built for this driver. If one is missing, you read which.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}  # for each CUDA version, from NVIDIA's website


# LOOK: the device that all lessons will use.
def show_devices():
    print("PyTorch version:", torch.__version__)
    print("Device in use:  ", DEVICE)
    print("CUDA available: ", torch.cuda.is_available())
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"GPU {index}:           {gpu.name}")
        print(f"  memory:        {gpu.total_memory / 2**30:.1f} GiB")
        print(f"  compute capability {gpu.major}.{gpu.minor}")
        print(f"  multiprocessors: {gpu.multi_processor_count}")


# CHECK: multiply on the device, and again on the CPU with twice as many bits for each number.
def check_product():
    a, b = torch.randn(2, 256, 256)
    product = a.to(DEVICE) @ b.to(DEVICE)  # .to() copies a tensor to the device
    expected = a.double() @ b.double()  # on the CPU
    return torch.allclose(product.cpu().double(), expected, atol=1e-3)


# SEARCH: only if PyTorch finds no GPU. Is there one? Which of the three parts is missing?
def find_driver():
    """Return the driver's version or None, and what nvidia-smi says if it fails."""
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    code, words = subprocess.getstatusoutput(query)
    if code == 127:  # this program is not installed
        return None, None
    if code != 0 or not words[:1].isdigit():
        return None, words.partition("\n")[0]
    return words.split()[0], None


def has_card():  # Linux lists all devices. Class 3 is a display, and vendor 10DE is NVIDIA.
    texts = [file.read_text() for file in Path("/sys/bus/pci/devices").glob("*/uevent")]
    return any("PCI_CLASS=3" in text and "PCI_ID=10DE" in text for text in texts)


def find_problem(driver, failure, card):
    """Return one sentence on why PyTorch cannot use the GPU, or None if there is no GPU."""
    if failure:
        return f"nvidia-smi fails: {failure}. Reboot, then check how the driver was installed."
    if driver is None:
        return "Your GPU has no driver. Type: scripts/setup_rhel9.sh" if card else None
    if (cuda := torch.version.cuda) is None:
        return "This PyTorch was built without CUDA. Type: uv sync --reinstall-package torch"
    needed = OLDEST_DRIVER.get(cuda.split(".")[0], 0)
    if int(driver.split(".")[0]) < needed:
        return f"Driver {driver} is too old for CUDA {cuda}, which needs {needed} or a newer one."
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={visible} may hide the GPU. Type: unset CUDA_VISIBLE_DEVICES"
    try:
        torch.cuda.init()
    except Exception as error:  # CUDA's own words are the best clue that is left
        return f"The driver answers, but CUDA does not start: {str(error).splitlines()[0]}"
    return "The driver answers, but PyTorch finds no GPU. Reboot, then run this lesson again."


def main():
    show_devices()
    product = "correct" if check_product() else "wrong"
    if DEVICE.type == "cpu":
        if problem := find_problem(*find_driver(), has_card()):
            sys.exit(problem)
        print("PyTorch finds no GPU to use. Every lesson also runs on the CPU, only slower.")
    print(f"Result: device = {DEVICE}, product = {product}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no effect: this lesson is short")
    parser.parse_args()
    try:
        main()
    except RuntimeError as error:  # for example, the card is too new or too old for this PyTorch
        sys.exit(f"{DEVICE} cannot multiply two matrices: {str(error).splitlines()[0]}")
