//! The address of a server: what stands in the user's URL, and how errors show it.

use std::net::IpAddr;

use anyhow::{Result, anyhow, bail, ensure};
use ureq::Proxy;
use ureq::http::Uri;

/// A URL of which a server can be asked.
pub struct Address(Uri);

impl Address {
    /// Checks the URL; `name` begins the errors.
    pub fn parse(name: &str, url: &str) -> Result<Self> {
        const FORM: &str = "write http://HOST:PORT/PATH or https://HOST/PATH";
        let uri: Uri = url.parse().map_err(|e| anyhow!("{name}: is no URL ({e}); {FORM}"))?;
        let scheme = uri.scheme_str().unwrap_or_default();
        ensure!(matches!(scheme, "http" | "https"), "{name}: is no URL of HTTP; {FORM}");
        ensure!(uri.host().is_some_and(|h| !h.is_empty()), "{name}: names no host; {FORM}");
        if let Some(port) = bad_port(&uri) {
            bail!("{name}: the port {port:?} is not one of 1 to 65535; {FORM}");
        }
        Ok(Self(uri))
    }

    pub fn uri(&self) -> &Uri {
        &self.0
    }

    /// The URL without its password.
    pub fn shown(&self) -> String {
        shown(&self.0.to_string())
    }

    /// The host as it is resolved: an address of IPv6 has no brackets.
    pub fn host(&self) -> &str {
        self.0.host().unwrap_or_default().trim_matches(['[', ']'])
    }

    pub fn port(&self) -> u16 {
        let https = self.0.scheme_str() == Some("https");
        self.0.port_u16().unwrap_or(if https { 443 } else { 80 })
    }

    /// The proxy of the environment, where it applies: not for this machine, nor for what
    /// `NO_PROXY` lists.
    pub fn proxy(&self) -> Option<Proxy> {
        let own = self.host().eq_ignore_ascii_case("localhost")
            || self.host().parse().is_ok_and(|address: IpAddr| address.is_loopback());
        Proxy::try_from_env().filter(|proxy| !own && !proxy.is_no_proxy(&self.0))
    }
}

/// What stands behind the host's colon and is no port. Parsing a URL lets it pass.
fn bad_port(uri: &Uri) -> Option<&str> {
    let behind_host = uri.authority()?.as_str().rsplit(['@', ']']).next()?;
    let (_, port) = behind_host.rsplit_once(':')?;
    Some(port).filter(|_| !port.is_empty() && uri.port_u16().is_none_or(|p| p == 0))
}

/// A URL as errors show it: `***` stands for a password, and for a name without one, which may be
/// a key. Works for what is no URL too.
pub fn shown(url: &str) -> String {
    let start = url.find("//").map_or(0, |at| at + 2);
    let rest = &url[start..];
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    // A password with a slash in it ends the authority early; the URL is wrong then.
    let right = url.parse::<Uri>().is_ok_and(|uri| bad_port(&uri).is_none());
    let part = if right { authority } else { rest };
    match part.rfind('@') {
        Some(at) => {
            let user =
                rest[..at].split_once(':').map_or(String::new(), |(user, _)| format!("{user}:"));
            format!("{}{user}***{}", &url[..start], &rest[at..])
        }
        None => url.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_shown() {
        for (url, right) in [
            ("http://host/a@b", "http://host/a@b"),
            ("http://me:secret@host:80/a@b?c#d", "http://me:***@host:80/a@b?c#d"),
            ("https://key@host", "https://***@host"),
            ("http://me:sec/ret@host/", "http://me:***@host/"),
            ("http://me:sec@ret@host/", "http://me:***@host/"),
            ("//me:secret@host/", "//me:***@host/"),
            ("me:secret@host", "me:***@host"),
        ] {
            assert_eq!(shown(url), right);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let bad = "|host|ftp://host/|http:/host|http://|http://h:99999/|http://h:0/|http://a b/|\
                   http://u:p@h:x/|http://[::1]:70000/|http://:80/|http://[::1";
        for url in bad.split('|') {
            let error = Address::parse("NAME", url).err().map(|e| e.to_string());
            assert!(error.is_some_and(|e| e.starts_with("NAME: ")), "{url:?} passes");
        }
        let address = Address::parse("", "https://me:secret@[::1]/path?a=b").unwrap();
        assert_eq!((address.host(), address.port()), ("::1", 443));
        assert_eq!(Address::parse("", "http://host:8000").unwrap().port(), 8000);
    }
}
