#!/bin/sh
# Finds what stands in for public images on a machine that reaches no registry of them: prints a name for each,
# in their order. Of an image that is there already, or can be pulled, its own; else one beginning with
# stand-in-, which it makes from Debian's packages. Needs debootstrap then.
# Usage: stand_ins.sh IMAGE..., each a name like python:3.11-slim-bookworm; for python, redis, haproxy and
# prom/prometheus.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

debian() {
    docker image inspect stand-in-debian:bookworm >/dev/null 2>&1 && return
    if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
        echo "no registry of images, and no debootstrap to make some (as root)" >&2
        exit 1
    fi
    # shellcheck disable=SC2086  # nothing where it is not set
    debootstrap --variant=minbase bookworm "$folder/root" ${DEBIAN_MIRROR:-} >&2
    rm -rf "$folder/root/var/cache/apt/archives" "$folder/root/var/lib/apt/lists"
    tar -C "$folder/root" -c . | docker import - stand-in-debian:bookworm >&2
    rm -rf "$folder/root"
}

# What an image has in it, as the lines of a Dockerfile.
recipe() {
    install='apt-get update && apt-get install -y --no-install-recommends'
    case $1 in
        python:3.11*)
            echo "RUN $install python3 python3-venv python3-pip ca-certificates"
            echo "RUN ln -s /usr/bin/python3 /usr/local/bin/python"
            echo "RUN rm /usr/lib/python3*/EXTERNALLY-MANAGED"
            # What this machine trusts, for package indexes.
            cp /etc/ssl/certs/ca-certificates.crt "$folder"
            echo "COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt"
            echo 'CMD ["python3"]'
            ;;
        redis:*)
            echo "RUN $install redis-server && install -d -o redis -g redis /data"
            echo "USER redis"
            echo "WORKDIR /data"
            echo "VOLUME /data"
            echo 'CMD ["redis-server"]'
            ;;
        haproxy:*)
            echo "RUN $install haproxy"
            echo "USER haproxy"
            echo "STOPSIGNAL SIGUSR1"
            echo 'CMD ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]'
            ;;
        prom/prometheus:*)
            echo "RUN $install prometheus wget && install -d -o prometheus -g prometheus /prometheus"
            echo "USER prometheus"
            echo "WORKDIR /prometheus"
            echo "VOLUME /prometheus"
            echo 'ENTRYPOINT ["prometheus"]'
            echo 'CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]'
            ;;
        *)
            echo "no stand-in for $1" >&2
            exit 1
            ;;
    esac
}

for image in "$@"; do
    if docker image inspect "$image" >/dev/null 2>&1 || docker pull --quiet "$image" >/dev/null 2>&1; then
        echo "$image"
        continue
    fi
    name=stand-in-$image
    echo "$name"
    debian
    {
        echo "FROM stand-in-debian:bookworm"
        recipe "$image"
    } >"$folder/Dockerfile"
    docker build --quiet --network host --tag "$name" "$folder" >&2
done
