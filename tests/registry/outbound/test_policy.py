"""Which URLs and addresses are refused before anything is sent."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from registry.config import Settings
from registry.outbound import make_outbound_client
from registry.outbound_policy import OutboundPolicy, OutboundRefused, is_public

STRICT = OutboundPolicy()

INSIDE = """
127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1
100.100.100.200 192.0.0.192 192.0.2.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
168.63.129.16 192.88.99.1 :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe
64:ff9b:1::1 2002:7f00:1:: 2002:808:808:: 2001:0:7f00:1:: 2001:db8::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1
100::1 192.0.0.9 2001:20::1 3fff::1
""".split()
OUTSIDE = "8.8.8.8 1.1.1.1 172.32.0.1 100.128.0.1 2606:4700:4700::1111 2a00:1450:4001:80b::200e ::ffff:8.8.8.8 64:ff9b::808:808".split()


@pytest.mark.parametrize("address", INSIDE)
def test_inside_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", OUTSIDE)
def test_outside_is_public(address: str) -> None:
    assert is_public(ip_address(address))


REFUSED_URLS = [
    "http://example.com/hook",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "//example.com/",
    "example.com/hook",
    "https://",
    "https:///hook",
    "https://user:password@example.com/",
    "https://user@example.com/",
    "https://example.com/#part",
    "https://example.com\\@10.0.0.1/",
    "https://exa mple.com/",
    "https://example.com/\r\nX-Header: 1",
    "https://example.com/\x00",
    "https://127.0.0.1/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[fe80::1%25eth0]/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://017700000001/",
    "https://0x7f.1/",
    "https://127.1/",
    "https://127.0.0.01/",
    "https://127.0.0.1./",
    "https://169.254.169.254/latest/meta-data/",
    "https://-bad-.example/",
    "https://a..b/",
    "https://①②⑦.0.0.1/",
    "https://example.com:99999/",
    "https://example.com:0/",
    "https://" + "a" * 3000 + ".com/",
    "javascript:alert(1)",
    "",
]


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_refused_urls(url: str) -> None:
    with pytest.raises(OutboundRefused) as refused:
        STRICT.check_url(url)
    assert refused.value.field == "url"
    assert refused.value.remedy


def test_a_refusal_repeats_no_password() -> None:
    with pytest.raises(OutboundRefused) as refused:
        STRICT.check_url("https://user:hunter2@example.com/")
    assert "hunter2" not in str(refused.value.problem())


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook?a=b",
        "https://8.8.8.8/",
        "https://[2606:4700:4700::1111]:8443/x",
        "https://bücher.example/ü",
        "https://a_b.example/",
    ],
)
def test_good_urls(url: str) -> None:
    assert STRICT.check_url(url).scheme == "https"


def test_the_operator_opens_hosts_and_ranges() -> None:
    policy = OutboundPolicy.parse(["hooks.internal", "10.1.0.0/16", "fd00::/8", "192.168.7.7"], allow_http=True)
    assert policy.check_url("http://10.1.2.3/").host == "10.1.2.3"
    policy.check_address("anything", ip_address("fd00::5"))
    policy.check_address("anything", ip_address("192.168.7.7"))
    policy.check_address("anything", ip_address("::ffff:10.1.0.9"))
    policy.check_address("Hooks.Internal.", ip_address("127.0.0.1"))
    for host, address in [("x", "10.2.0.1"), ("x", "192.168.7.8"), ("sub.hooks.internal", "127.0.0.1"), ("x", "64:ff9b::a01:203")]:
        with pytest.raises(OutboundRefused):
            policy.check_address(host, ip_address(address))


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "10.1.2.3/8", "http://x", "*.example", "2130706433", "a b"])
def test_an_allow_list_that_cannot_be_read_fails_at_start(entry: str) -> None:
    with pytest.raises(ValueError, match="LORARY_OUTBOUND_ALLOW_HOSTS"):
        OutboundPolicy.parse([entry], allow_http=False)


def test_settings_read_the_list_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARY_OUTBOUND_ALLOW_HOSTS", " hooks.internal, 10.0.0.0/8 ,")
    monkeypatch.setenv("LORARY_OUTBOUND_ALLOW_HTTP", "1")
    policy = make_outbound_client(Settings()).policy
    assert policy == OutboundPolicy.parse(["hooks.internal", "10.0.0.0/8"], allow_http=True)
