#!/bin/bash
# Starts Ceph's S3 gateway on 127.0.0.1:9104 with one monitor and one OSD in memory; keys testkey, testsecret.
#
#   radosgw.sh DIR       DIR/root holds Debian's packages, unpacked; nothing is installed:
#
#     apt-get install --no-install-recommends -s radosgw ceph-mon ceph-osd | awk '/^Inst/ {print $2}' > list
#     mkdir debs root && (cd debs && apt-get download $(cat ../list)) && for d in debs/*.deb; do dpkg -x $d root; done
#
# Their process numbers are in DIR/run/*.number. The store takes 4 GiB, and hangs once it is full: start it anew.
set -euo pipefail
dir=$(realpath "${1:?radosgw.sh DIR}") root=$dir/root run=$dir/run
libraries=$root/usr/lib/$(uname -m)-linux-gnu
rm -rf "$run" && mkdir -p "$run"/{mon,osd,rgw,log}
export LD_LIBRARY_PATH=$libraries:$libraries/ceph:$root/lib/$(uname -m)-linux-gnu:$root/usr/lib
export PATH=$root/usr/bin:$PATH PYTHONPATH=$root/usr/lib/python3/dist-packages
export CEPH_CONF=$run/ceph.conf CEPH_ARGS="-c $run/ceph.conf"
id=$(cat /proc/sys/kernel/random/uuid)
cat >"$CEPH_CONF" <<X
[global]
fsid = $id
mon host = v2:127.0.0.1:3400
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
run dir = $run
log file = $run/log/\$name.log
admin socket = $run/\$name.asok
plugin dir = $libraries
erasure code dir = $libraries/ceph/erasure-code
osd class dir = $libraries/rados-classes
osd objectstore = memstore
memstore device bytes = 4294967296
memstore page set = true
osd max object name len = 256
osd max object namespace len = 64
mon data = $run/mon
osd data = $run/osd
keyring = $run/keyring
auth allow insecure global id reclaim = false
[client.rgw]
rgw data = $run/rgw
rgw frontends = beast endpoint=127.0.0.1:9104
rgw dns name = 127.0.0.1
X

start() { # NAME COMMAND...
  "${@:2}" -f >"$run/log/$1.out" 2>&1 &
  echo $! >"$run/$1.number"
}

ceph-authtool --create-keyring "$run/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
for name in client.admin client.rgw osd.0; do
  ceph-authtool "$run/keyring" --gen-key -n $name --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
done
monmaptool --create --fsid "$id" --addv a '[v2:127.0.0.1:3400]' "$run/monmap" >/dev/null
ceph-mon -i a --mkfs --monmap "$run/monmap" --keyring "$run/keyring"
start mon ceph-mon -i a
sleep 2
osd=$(cat /proc/sys/kernel/random/uuid)
python3 "$root/usr/bin/ceph" osd new "$osd"
python3 "$root/usr/bin/ceph" auth import -i "$run/keyring"
ceph-osd -i 0 --mkfs --osd-uuid "$osd"
start osd ceph-osd -i 0
sleep 3
start rgw radosgw -n client.rgw
until curl -s -o /dev/null http://127.0.0.1:9104/; do sleep 1; done
radosgw-admin -n client.rgw user create --uid test --display-name test --access-key testkey --secret testsecret >/dev/null
