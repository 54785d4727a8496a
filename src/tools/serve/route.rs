//! What an address asks for. It names a run by the name that the list has; no part of it is a path.

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::train::wishes::{WISHES, Wish};

/// What a request is about.
#[derive(Debug, PartialEq, Eq)]
pub struct Route {
    /// The run by its name; none is the list of all.
    pub run: Option<String>,
    pub part: Part,
}

/// What is wanted of a run or of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The whole page.
    Page,
    /// What is inside its `<main>`.
    Main,
    /// A text that changes when the page does.
    Version,
    /// A wish to the run. The list has none.
    Wish(Wish),
}

impl Route {
    /// The route of an address' path: `/`, `/main`, `/version`, `/run/NAME`, `/run/NAME/main`,
    /// `/run/NAME/version` and `/run/NAME/WISH`.
    pub fn parse(path: &str) -> Option<Self> {
        let mut rest = path.strip_prefix('/')?;
        let mut run = None;
        if let Some(named) = rest.strip_prefix("run/") {
            let (name, part) = named.split_once('/').unwrap_or((named, ""));
            // `/run/NAME/` would resolve the page's links otherwise than `/run/NAME`.
            if named.ends_with('/') {
                return None;
            }
            run = Some(percent_decode_str(name).decode_utf8().ok()?.into_owned());
            rest = part;
        }
        let part = match rest {
            "" => Part::Page,
            "main" => Part::Main,
            "version" => Part::Version,
            other => {
                let wish = WISHES.into_iter().find(|wish| wish.name() == other);
                Part::Wish(wish.filter(|_| run.is_some())?)
            }
        };
        Some(Self { run, part })
    }

    /// The address of a page or of a part of it.
    pub fn path(&self) -> String {
        let part = match self.part {
            Part::Page => "",
            Part::Main => "main",
            Part::Version => "version",
            Part::Wish(wish) => wish.name(),
        };
        let base = Self::base(self.run.as_deref());
        if part.is_empty() && !base.is_empty() { base } else { format!("{base}/{part}") }
    }

    /// The address of the run or of the list: `/run/NAME`, or nothing. A part follows behind `/`.
    pub fn base(run: Option<&str>) -> String {
        let encoded = |name| utf8_percent_encode(name, NON_ALPHANUMERIC);
        run.map_or(String::new(), |name| format!("/run/{}", encoded(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back() {
        for name in ["pcpo-001", "a b", "..", "x/../y", "a%2fb", "größe", "?#&\"'<>", "\\", "main"]
        {
            let base = Route::base(Some(name));
            let page = Route::parse(&base).unwrap();
            assert_eq!(page, Route { run: Some(name.into()), part: Part::Page });
            let stop = Route::parse(&format!("{base}/stop")).unwrap();
            assert_eq!(stop.part, Part::Wish(Wish::Stop));
            assert_eq!(stop.run.as_deref(), Some(name));
            assert_eq!(page.path(), base);
            assert_eq!(stop.path(), format!("{base}/stop"));
        }
        assert_eq!(Route::parse("/").unwrap(), Route { run: None, part: Part::Page });
        assert_eq!(Route::parse("/").unwrap().path(), "/");
        let list = Route { run: None, part: Part::Version };
        assert_eq!(Route::parse("/version").unwrap(), list);
        for none in ["", "*", "//", "/run", "/run/a/", "/run/a/b", "/stop", "/run/a/main/x", "/%"] {
            assert_eq!(Route::parse(none), None, "{none}");
        }
        assert_eq!(Route::parse("/run/%ff"), None, "not UTF-8");
    }
}
