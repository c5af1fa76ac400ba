#!/bin/bash
# Runs inside the machine at each start, on Debian 12 with systemd. The packages and the programs of
# the other host are in the same directory.
exec </dev/null >/dev/ttyS0 2>&1
export PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
cd /opt/story || exit 1
kept=/var/story
mkdir -p $kept

failed() {
    echo "FAILED: $*"
    overnode status 2>&1 | head -40
    journalctl -u overnode -n 25 --no-pager -o cat
    echo "vm-part package 1"
    sync
    poweroff -f
    exit 1
}
check() {
    local what=$1
    shift
    if "$@" >/tmp/said 2>&1; then echo "ok: $what"; else cat /tmp/said; failed "$what"; fi
}
# $1 seconds at most, then a command.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/tmp/said 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}
uptime() { cut -d ' ' -f 1 /proc/uptime; }
workers() { overnode status --json | tr -d ' \n' | grep '"workers":1' && pgrep -x overnode-bulk; }
pid() { systemctl show -P MainPID overnode; }

# The other host: a network namespace with programs of its own, which no package replaces.
other() { ip netns exec other bin/overnode --state-dir /var/lib/other --run-dir /run/other "$@"; }
make_other() {
    ip netns add other
    ip netns add box
    ip link add u0 type veth peer name u1 netns other
    ip address add 192.0.2.1/24 dev u0
    ip link set u0 up
    ip -n other address add 192.0.2.2/24 dev u1
    ip -n other link set lo up
    ip -n other link set u1 up
}
reaches() { ip netns exec "$1" ping -c 1 -W 1 "$2"; }
web() { docker inspect -f '{{.NetworkSettings.Networks.overnode.IPAddress}}' web; }

# Every file, interface, rule, pinned object and unit that a package could leave.
look() {
    find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /var/tmp \
        -o -path /var/log -o -path /opt -o -path /root \
        -o -path /var/lib/docker -o -path /var/lib/containerd -o -path /var/lib/dpkg \
        -o -path /var/lib/systemd -o -path /var/story \) \
        -prune -o -print | sort
    find /run -path '*overnode*' | sort
    find /sys/fs/bpf | sort
    ip -o link | sed 's/^[0-9]*: //; s/[@:].*//' | grep -v -e '^docker' -e '^veth' | sort
    ip rule
    ip route show table all | grep -v docker | grep -v 172.1
    systemctl list-unit-files --no-legend --no-pager | grep overnode
}

# $1 packets at 10 ms from namespace $2 to address $3 into file $4.
flow() { ip netns exec "$2" ping -q -i 0.01 -c "$1" "$3" >"$4" 2>&1 & }
lossless() {
    local what=$1
    shift
    wait
    for file; do
        echo "    $(grep transmitted "$file")"
        grep -q ' 0% packet loss' "$file" || failed "packets were lost: $what"
    done
    echo "ok: no packet lost: $what"
}

first() {
    echo "Debian runs after $(uptime) s"
    within 240 docker version || failed "no Docker engine"
    look >$kept/before
    check "the package is installed" dpkg -i 1.deb
    [ "$(systemctl is-enabled overnode)" = disabled ] || failed "a host without a node starts one"
    make_other
    mkdir -p /tmp/image/bin
    cp /bin/busybox /tmp/image/bin/
    tar -C /tmp/image -c . | docker import - box >/dev/null
    check "launch" overnode launch --id 1 --token story 192.0.2.2
    systemctl show overnode -P Type -P WatchdogUSec -P ActiveState -P SubState -P UnitFileState |
        tr '\n' ' '
    echo
    unit=$(systemctl show overnode -P Type -P ActiveState -P UnitFileState | tr '\n' ' ')
    [ "$unit" = "notify active enabled " ] || failed "the unit is in another state: $unit"
    check "launch on the other host" other launch --id 2 --token story 192.0.2.1
    check "attach there" other attach netns:box --name box
    within 180 docker network inspect overnode || failed "Docker has no network overnode"
    check "docker run" docker run -d --name web --restart always --network overnode \
        box /bin/busybox sleep 1000000
    within 180 reaches box "$(web)" || failed "the other host does not reach the container $(web)"
    within 60 workers || failed "no workers: $(overnode status --json)"
    echo "ok: the bulk path has a worker, under the unit's restrictions, too"
    echo "ok: a container of the other host reaches the one of Docker, $(web)"
    echo 2 >$kept/stage
    sync
    systemctl reboot
}

second() {
    make_other
    other resume || failed "the other host does not resume"
    within 180 systemctl is-active overnode || failed "the node is not back"
    within 180 other attach netns:box --name box ||
        failed "attach on the other host: $(cat /tmp/said)"
    within 180 web || failed "no container"
    within 180 reaches box "$(web)" || failed "the container network is not back"
    ready() { echo $(($(systemctl show -P ActiveEnterTimestampMonotonic "$1") / 1000)); }
    echo "ok: after a reboot the container network is back, $(uptime) s after the kernel's start;" \
        "the node was ready at $(ready overnode) ms, Docker at $(ready docker) ms"
    ip netns add near
    check "attach" overnode attach netns:near --name near
    box=$(other status --endpoints --json | grep -o '10\.4[0-9]\.[0-9]*\.[0-9]*' | head -1)
    within 120 reaches near "$box" || failed "near does not reach box ($box)"

    within 60 workers || failed "no workers after the reboot"
    old=$(pid)
    flow 1500 box "$(web)" /tmp/in
    flow 1500 near "$box" /tmp/out
    sleep 2
    begun=$(uptime)
    check "the package is upgraded" dpkg -i 2.deb
    echo "    dpkg ran from $begun to $(uptime); daemon $old, then $(pid);" \
        "$(dpkg-query -W overnode)"
    [ "$old" != "$(pid)" ] || failed "the daemon was not restarted"
    lossless "upgrade, ping at 10 ms both ways through the tunnel" /tmp/in /tmp/out

    old=$(pid)
    flow 6000 box "$(web)" /tmp/in
    kill -STOP "$old"
    replaced() { [ "$(pid)" != "$old" ] && systemctl is-active overnode; }
    within 180 replaced || failed "the watchdog does not replace the daemon"
    echo "ok: the watchdog replaced a daemon that hung"
    lossless "watchdog" /tmp/in

    flow 1500 box "$(web)" /tmp/in
    check "the package is removed" dpkg -r overnode
    pgrep -f '^/usr/sbin/overnoded|^overnoded' && failed "the daemon still runs"
    check "and installed again" dpkg -i 2.deb
    within 120 systemctl is-active overnode || failed "the node is not back"
    lossless "remove and install" /tmp/in
    within 120 reaches near "$box" || failed "the tunnel is not back"

    docker rm -f web >/dev/null
    check "the package is purged, with a node and a container" dpkg -P overnode
    docker network ls --format '{{.Name}} {{.Driver}}' | grep overnode &&
        echo "    (Docker's list still has the network, as documented)"
    tc qdisc show dev u0 | grep clsact && failed "the underlay interface still has our qdisc"
    other reset --force >/dev/null || failed "the other host cannot be reset"
    ip netns delete box
    ip netns delete near
    ip netns delete other
    ip link delete u0 2>/dev/null
    rm -rf /var/lib/other /run/other
    rmdir /sys/fs/bpf/overnode 2>/dev/null
    look >$kept/after
    diff $kept/before $kept/after || failed "something is left"
    echo "ok: nothing is left"
    echo "vm-part package 0"
    sync
    poweroff -f
}

if [ -e $kept/stage ]; then second; else first; fi
