#!/usr/bin/env bash
# Run an Ollama server for this course: start | stop | pull MODEL | status
# In Podman, else in Docker, else with an ollama that is installed; on the GPU where there is one. The
# server is for this machine alone, 127.0.0.1: it asks for no password, and whoever reaches it may use,
# replace and delete models. Set OLLAMA_IMAGE for another image than docker.io/ollama/ollama.
set -u

url=http://127.0.0.1:11434
image=${OLLAMA_IMAGE:-docker.io/ollama/ollama}
wait_seconds=${OLLAMA_WAIT:-60}
home=${HOME:?}/.ollama

say() { printf '%s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
answers() { curl --silent --fail --max-time 5 --noproxy '*' "$url/api/version"; }
gpu() { have nvidia-smi && nvidia-smi -L >/dev/null 2>&1; }

find_engine() { # podman, docker that works, or ollama
    if have podman; then
        echo podman
    elif have docker && docker info >/dev/null 2>&1; then
        echo docker
    elif have ollama; then
        echo ollama
    else
        die "Neither podman nor docker nor ollama is here. On RHEL type: sudo dnf install podman"
    fi
}

started() { # when a process was started: a later process of the same number has another time
    if [ -r "/proc/$1/stat" ]; then
        sed 's/.*) //' "/proc/$1/stat" | cut -d ' ' -f 20
    else
        ps -o lstart= -p "$1" 2>/dev/null
    fi
}

stop_serving() { # end the process that the pid file names, if it is the one that start has started
    local pid time
    { read -r pid && read -r time; } 2>/dev/null <"$home/serve.pid" || return 1
    rm -f "$home/serve.pid"
    [[ "$pid" =~ ^[0-9]+$ && -n "$time" ]] && [ "$(started "$pid")" = "$time" ] && kill "$pid"
}

exists() { "$engine" container inspect ollama >/dev/null 2>&1; }

make_container() {
    local flags=(--detach --name ollama --publish 127.0.0.1:11434:11434)
    if ! gpu; then
        say "No NVIDIA GPU that works: Ollama will use the CPU."
    elif [ "$engine" = podman ] && nvidia-ctk cdi list 2>/dev/null | grep -q 'nvidia.com/gpu=all'; then
        flags+=(--device nvidia.com/gpu=all --security-opt label=disable)
        say "Giving the container the GPU."
    elif [ "$engine" = docker ] && have nvidia-ctk; then
        flags+=(--gpus all)
        say "Giving the container the GPU."
    else
        say "The GPU is not prepared for containers, so Ollama will use the CPU. To change that, type:"
        say "  sudo dnf install nvidia-container-toolkit"
        say "  sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        say "  $engine rm --force ollama; scripts/ollama.sh start"
    fi
    if [ "$engine" = podman ]; then
        mkdir -p "$home" || die "Cannot make $home, where the models go."
        flags+=(--volume "$home:/root/.ollama")
        case " ${flags[*]} " in *" label=disable "*) ;; *) flags[-1]+=":Z" ;; esac
    else
        flags+=(--volume ollama:/root/.ollama) # Docker's root would own the files in a home folder
    fi
    say "Making the container ollama from $image; the first time downloads some gigabytes."
    "$engine" run "${flags[@]}" "$image" >/dev/null || die "$engine could not start $image."
}

start() {
    if answers >/dev/null; then
        say "Ollama answers already at $url."
        return
    fi
    engine=$(find_engine) || exit 1
    if [ "$engine" = ollama ]; then
        mkdir -p "$home" || die "Cannot make $home."
        say "Starting the ollama that is installed here; it writes to $home/serve.log."
        OLLAMA_HOST=127.0.0.1:11434 nohup ollama serve >>"$home/serve.log" 2>&1 &
        printf '%s\n' $! "$(started $!)" >"$home/serve.pid"
    elif exists; then
        if "$engine" port ollama 2>/dev/null | grep -qv '> 127.0.0.1:'; then
            die "The container ollama is open to the network. Remove it (models stay): $engine rm --force ollama"
        fi
        say "Starting the container ollama again."
        "$engine" start ollama >/dev/null || die "$engine could not start the container ollama."
    else
        make_container
    fi
    for ((second = 0; second < wait_seconds; second++)); do
        if answers >/dev/null; then
            say "Ollama answers at $url, from this machine only."
            return
        fi
        sleep 1
    done
    if [ "$engine" = ollama ]; then
        tail -n 5 "$home/serve.log" >&2
        stop_serving
    else
        "$engine" logs --tail 5 ollama >&2
    fi
    die "Ollama has not answered within $wait_seconds s; its last lines are above."
}

stop() {
    engine=$(find_engine) || exit 1
    if [ "$engine" = ollama ]; then
        if stop_serving; then
            say "Stopped ollama."
        else
            say "No ollama that this script started is running."
        fi
    elif exists; then
        "$engine" stop ollama >/dev/null || die "$engine could not stop the container ollama."
        say "Stopped the container ollama; its models stay."
    else
        say "There is no container ollama to stop."
    fi
}

pull() {
    [[ "${1:-}" =~ ^[A-Za-z0-9][A-Za-z0-9._:/-]*$ ]] || die "usage: scripts/ollama.sh pull MODEL, such as tinyllama"
    answers >/dev/null || die "No server answers at $url. Start it: scripts/ollama.sh start"
    engine=$(find_engine) || exit 1
    say "Downloading $1."
    if [ "$engine" != ollama ] && exists; then
        "$engine" exec ollama ollama pull "$1" || die "Could not download $1."
    elif have ollama; then
        OLLAMA_HOST=127.0.0.1:11434 ollama pull "$1" || die "Could not download $1."
    else
        curl --silent --show-error --fail --noproxy '*' "$url/api/pull" --data "{\"model\":\"$1\"}" |
            tail -n 1 | grep -q success || die "Could not download $1."
    fi
    say "$1 is there."
}

status() {
    version=$(answers) || die "No server answers at $url. Start it: scripts/ollama.sh start"
    say "Ollama answers at $url: $version"
    say "Models: $(curl --silent --max-time 5 --noproxy '*' "$url/api/tags" | grep -o '"name":"[^"]*"' | cut -d '"' -f 4 | tr '\n' ' ')"
}

have curl || die "curl is missing. On RHEL type: sudo dnf install curl"
case "${1:-}" in
    start | stop | status) [ $# = 1 ] || die "usage: scripts/ollama.sh $1"; "$1" ;;
    pull) [ $# = 2 ] || die "usage: scripts/ollama.sh pull MODEL"; pull "$2" ;;
    -h | --help) sed -n '2,5s/^# //p' "$0" ;;
    *) echo "usage: scripts/ollama.sh start | stop | pull MODEL | status" >&2; exit 2 ;;
esac
