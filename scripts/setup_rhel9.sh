#!/usr/bin/env bash
# Check what this course needs on RHEL 9 with an NVIDIA GPU, and say what to type for what is missing.
# It changes nothing. Exit code 0: ready; 1: something that the course cannot do without is missing.
set -u

case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,3s/^# //p' "$0"; exit 0 ;;
    *) echo "usage: scripts/setup_rhel9.sh (no arguments; it only looks)" >&2; exit 2 ;;
esac

cd "$(dirname "$0")/.." || exit 1
missing=0
good() { printf '  ok       %s\n' "$1"; }
note() { printf '  optional %s\n' "$1"; [ $# = 1 ] || printf '           type: %s\n' "$2"; }
lack() { printf '  MISSING  %s\n           type: %s\n' "$1" "$2"; missing=1; }
have() { command -v "$1" >/dev/null 2>&1; }
enable() { # the name on RHEL itself, the name on its rebuilds
    if [ "$(setting ID)" = rhel ]; then
        echo "sudo subscription-manager repos --enable $1"
    else
        echo "sudo dnf config-manager --set-enabled $2"
    fi
}
setting() { sed -n "s/^$1=\"\{0,1\}\([^\"]*\).*/\1/p" /etc/os-release 2>/dev/null; }

echo "System"
system="$(setting ID) $(setting VERSION_ID)"
case "$system" in
    "rhel 9"* | "rocky 9"* | "almalinux 9"* | "centos 9"*) good "$system" ;;
    *) note "this is $system, not RHEL 9: the names of packages below may differ here" ;;
esac
if have dnf; then
    for part in baseos appstream; do
        if dnf -q repolist 2>/dev/null | grep -qi "$part"; then
            good "repository $part"
        else
            lack "repository $part" "$(enable "rhel-9-for-x86_64-$part-rpms" "$part")"
        fi
    done
    if dnf -q repolist 2>/dev/null | grep -qiE 'codeready|crb'; then
        good "CodeReady Builder, from which the driver's build tools come"
    else
        note "CodeReady Builder, for building the driver" \
            "$(enable codeready-builder-for-rhel-9-x86_64-rpms crb)"
    fi
fi
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
if [ -d .venv ]; then
    good "the packages are installed already: .venv"
elif [ "$free" -ge 12 ]; then
    good "$free GiB free here; PyTorch with its CUDA libraries takes about 7"
else
    lack "12 GiB of disk, of which only $free are free here" "df -h . (then make room, or move the course)"
fi

echo "GPU"
install_driver="sudo dnf module reset nvidia-driver && sudo dnf module install nvidia-driver:550-dkms"
if ! have lspci; then
    note "lspci, to see whether a card is there" "sudo dnf install pciutils"
elif ! lspci | grep -qiE '(vga|3d|display).*nvidia'; then
    note "an NVIDIA card: none is on the PCI bus, so the lessons will use the CPU"
fi
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
if [[ "$driver" =~ ^[0-9]+\. ]]; then
    if [ "${driver%%.*}" -ge 525 ]; then
        good "driver $driver; CUDA 12, which PyTorch brings along, needs 525 or newer"
    else
        lack "a newer driver than $driver; CUDA 12 needs 525" "$install_driver"
    fi
elif have nvidia-smi; then
    lack "a driver that is loaded: nvidia-smi is here but fails" \
        "sudo reboot (and if that does not help: mokutil --sb-state; dkms status)"
elif have lspci && lspci | grep -qiE '(vga|3d|display).*nvidia'; then
    lack "the NVIDIA driver (add NVIDIA's CUDA repository first, as its installation guide says)" \
        "$install_driver && sudo reboot"
fi

echo "Tools"
if have uv; then
    good "$(uv --version)"
else
    lack "uv, which installs everything else, Python too" "python3 -m pip install --user uv"
fi
python=""
for candidate in python3.13 python3.12 python3.11; do
    "$candidate" --version >/dev/null 2>&1 && python=$candidate && break
done
if [ -n "$python" ]; then
    good "$("$python" --version); RHEL's own 3.9 is too old for this course"
else
    note "Python 3.11 to 3.13: uv downloads one where it may; otherwise" "sudo dnf install python3.12"
fi
if have gcc && have g++; then
    good "gcc $(gcc -dumpversion), for torch.compile"
else
    note "gcc and g++, for torch.compile" "sudo dnf install gcc gcc-c++ python3.12-devel"
fi

if [ "$missing" = 0 ]; then
    echo "Ready. Next: uv run src/basics/01_verify_gpu.py"
else
    echo "Not ready: type what is named above, then run this again."
fi
exit "$missing"
