//! That the server stands up to a hostile page in the same browser, and to clients that send
//! nonsense, too much, or nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{Served, asked, folder, live, write_run};

#[test]
fn another_origin_is_refused_and_leaves_no_file() {
    let dir = folder();
    let run = dir.path().join("pcpo-001");
    let _lock = live(&run);
    let served = Served::new(dir.path(), &[]);
    let other_port = "Origin: http://127.0.0.1:1";
    let own = format!("Origin: http://127.0.0.1:{}", served.port);
    let by_name = format!("Origin: http://localhost:{}", served.port);
    let tls = format!("Origin: https://127.0.0.1:{}", served.port);
    let longer = format!("Origin: http://127.0.0.1:{}.evil.example", served.port);
    let foreign: &[&[&str]] = &[
        &["Origin: http://evil.example"],
        &["Origin: null"],
        &["Origin:"],
        &[other_port],
        &[&by_name],
        &[&tls],
        &[&longer],
        &[&own, "Origin: http://evil.example"],
        &["Sec-Fetch-Site: cross-site"],
        &["Sec-Fetch-Site: same-site"],
        &[&own, "Sec-Fetch-Site: cross-site"],
    ];
    let paths = ["/", "/run/pcpo-001", "/run/pcpo-001/main", "/run/pcpo-001/version"];
    for headers in foreign {
        for path in paths {
            assert_eq!(served.ask("GET", path, headers).status, 403, "{path} {headers:?}");
        }
        let marked = [&["X-Pcpo: 1"], *headers].concat();
        for headers in [headers, &marked[..]] {
            let reply = served.ask("POST", "/run/pcpo-001/stop", headers);
            assert_eq!(reply.status, 403, "{headers:?}");
            assert!(!reply.head.contains("access-control"), "{}", reply.head);
        }
        let preflight = [&["Access-Control-Request-Headers: x-pcpo"], *headers].concat();
        let reply = served.ask("OPTIONS", "/run/pcpo-001/stop", &preflight);
        assert!(reply.status == 403 && !reply.head.contains("access-control"), "{}", reply.head);
    }
    // An old browser's form has neither; only a program sends the mark.
    let form = ["Content-Type: application/x-www-form-urlencoded"];
    for headers in [&[][..], &form, &["X-Pcpo: 0"], &["Sec-Fetch-Site: none"]] {
        assert_eq!(served.ask("POST", "/run/pcpo-001/stop", headers).status, 403, "{headers:?}");
    }
    assert!(!run.join("control").exists());
    for headers in
        [&[][..], &[&own[..]], &["Sec-Fetch-Site: none"], &["Sec-Fetch-Site: same-origin"]]
    {
        assert_eq!(served.ask("GET", "/", headers).status, 200, "{headers:?}");
    }
}

#[test]
fn a_foreign_name_for_this_address_is_refused() {
    let dir = folder();
    let run = dir.path().join("pcpo-001");
    let _lock = live(&run);
    let served = Served::new(dir.path(), &[]);
    let port = served.port;
    let wrong = [
        format!("Host: evil.example:{port}\r\n"),
        "Host: 127.0.0.1\r\n".into(),
        "Host: 127.0.0.1:1\r\n".into(),
        format!("Host: 127.0.0.1.evil.example:{port}\r\n"),
        format!("Host: user@127.0.0.1:{port}\r\n"),
        format!("Host: 127.0.0.1:{port}\r\nHost: evil.example:{port}\r\n"),
        "Host:\r\n".into(),
        String::new(),
    ];
    for hosts in wrong {
        let get = served.raw(&format!("GET / HTTP/1.1\r\n{hosts}\r\n"));
        assert!(get.status == 403, "{hosts:?}: {} {}", get.status, get.body);
        let origin = format!("Origin: http://evil.example:{port}");
        for header in [&origin, "X-Pcpo: 1"] {
            let request = format!("POST /run/pcpo-001/stop HTTP/1.1\r\n{hosts}{header}\r\n\r\n");
            assert_eq!(served.raw(&request).status, 403, "{hosts:?} {header}");
        }
    }
    let own = format!("Host: 127.0.0.1:{port}\r\n");
    let proxy = format!("GET http://evil.example:{port}/ HTTP/1.1\r\n{own}\r\n");
    assert_eq!(served.raw(&proxy).status, 403);
    assert!(!run.join("control").exists());
    for name in ["127.0.0.1", "localhost", "LocalHost", "[::1]"] {
        let request = format!("GET / HTTP/1.1\r\nHost: {name}:{port}\r\n\r\n");
        assert_eq!(served.raw(&request).status, 200, "{name}");
    }
}

#[test]
fn a_token_is_asked_for_and_becomes_a_cookie() {
    let dir = folder();
    let run = dir.path().join("pcpo-001");
    let _lock = live(&run);
    let served = Served::new(dir.path(), &["--token", "Straße; 1"]);
    let query = "?token=Stra%C3%9Fe%3B%201";
    assert!(served.line.ends_with(&format!(":{}/{query}", served.port)), "{}", served.line);
    let bearer = "Authorization: Bearer Straße; 1";
    let wrong: &[(&str, &[&str])] = &[
        ("", &[]),
        ("?token=", &[]),
        ("?token=wrong", &[]),
        ("?token=Stra%C3%9Fe%3B%2", &[]),
        ("?token=wrong", &[bearer]),
        ("?other=Stra%C3%9Fe%3B%201", &[]),
        ("", &["Authorization: Bearer wrong"]),
        ("", &["Authorization: Basic Straße; 1"]),
        ("", &["Cookie: token=Straße; 1"]),
        ("", &["X-Pcpo: 1"]),
    ];
    for (query, headers) in wrong {
        for path in ["/", "/run/pcpo-001", "/run/pcpo-001/main", "/nothing"] {
            let reply = served.ask("GET", &format!("{path}{query}"), headers);
            assert_eq!(reply.status, 401, "{path}{query} {headers:?}");
            assert!(reply.header("set-cookie").is_none() && !reply.body.contains("pcpo-001"));
        }
        let headers = [&["X-Pcpo: 1"], *headers].concat();
        let post = served.ask("POST", &format!("/run/pcpo-001/stop{query}"), &headers);
        assert_eq!(post.status, 401, "{query} {headers:?}");
    }
    assert!(!run.join("control").exists());
    assert_eq!(served.ask("GET", "/", &[bearer]).status, 200);

    let entry = served.get(&format!("/run/pcpo-001{query}"));
    assert_eq!((entry.status, entry.header("location")), (303, Some("/run/pcpo%2d001")));
    let cookie = entry.header("set-cookie").unwrap();
    assert!(cookie.ends_with("; path=/; httponly; samesite=strict"), "{cookie}");
    let pair = cookie.split(';').next().unwrap();
    let right = format!("Cookie: theme=dark; {pair}");
    assert_eq!(served.ask("GET", "/run/pcpo-001", &[&right]).status, 200);
    assert_eq!(served.ask("GET", "/", &[&format!("{right}0")]).status, 401);
    // The cookie alone presses no button.
    let foreign = [&right[..], "Origin: http://evil.example"];
    assert_eq!(served.ask("POST", "/run/pcpo-001/stop", &foreign).status, 403);
    assert_eq!(served.ask("POST", "/run/pcpo-001/stop", &[&right]).status, 403);
    assert!(!run.join("control").exists());
    let own = format!("Origin: http://127.0.0.1:{}", served.port);
    assert_eq!(served.ask("POST", "/run/pcpo-001/stop", &[&right, &own]).status, 202);
    let stranger = served.ask("GET", &format!("/{query}"), &["Origin: http://evil.example"]);
    assert_eq!(stranger.status, 403);
    // An address that begins with // would lead to another machine.
    assert_eq!(served.get(&format!("//evil.example/{query}")).status, 404);
}

#[test]
fn other_machines_need_a_token() {
    let dir = folder();
    let served = Served::new(dir.path(), &["--host", "0.0.0.0"]);
    let (_, token) = served.line.split_once("/?token=").expect(&served.line);
    assert!(token.len() >= 32 && token.bytes().all(|b| b.is_ascii_alphanumeric()), "{token}");
    assert_eq!(served.get("/").status, 401);
    assert_eq!(served.get("/?token=0123").status, 401);
    assert_eq!(served.get(&format!("/?token={token}")).status, 303);
    let bearer = format!("Authorization: Bearer {token}");
    let lan = |headers: &str| format!("GET / HTTP/1.1\r\nHost: gpu.lan:1\r\n{headers}\r\n\r\n");
    assert_eq!(served.raw(&lan(&bearer)).status, 200, "it has names that it does not know");
    assert_eq!(served.raw(&lan(&format!("{bearer}\r\nOrigin: http://evil.lan"))).status, 403);
    let again = Served::new(dir.path(), &["--host", "0.0.0.0"]);
    assert!(!again.line.contains(token), "a new one each time");
}

#[test]
fn no_address_leads_out_of_the_folder() {
    let outside = folder();
    let dir = outside.path().join("runs");
    write_run(&dir.join("a"));
    let _lock = live(&outside.path().join("pcpo-001"));
    let served = Served::new(&dir, &[]);
    let absolute = outside.path().join("pcpo-001").to_str().unwrap().replace('/', "%2F");
    let names = [
        "..",
        ".",
        "../pcpo-001",
        "..%2fpcpo-001",
        "%2e%2e%2fpcpo-001",
        "%2e%2e/pcpo-001",
        "%252e%252e%252fpcpo-001",
        "a/../../pcpo-001",
        "a%2f..%2f..%2fpcpo-001",
        "..\\pcpo-001",
        "..%5cpcpo-001",
        "..%c0%afpcpo-001",
        "a%00",
        "a%00/../../pcpo-001",
        "%00",
        "a/metrics.jsonl",
        "a%2fmetrics.jsonl",
        "a/grids/epoch-00000.png",
        "A%20",
        "a.",
        "",
        "%2fetc%2fpasswd",
        &absolute,
    ];
    for name in names {
        for part in ["", "/main", "/version"] {
            let reply = served.get(&format!("/run/{name}{part}"));
            assert_eq!(reply.status, 404, "{name}{part}: {}", reply.body);
        }
        assert_eq!(served.post(&format!("/run/{name}/stop")).status, 404, "{name}");
    }
    for path in ["/../secret.txt", "/secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt"] {
        let reply = served.get(path);
        assert!(reply.status == 404 && !reply.body.contains("SECRET"), "{path}");
    }
    assert!(!outside.path().join("pcpo-001/control").exists());
    assert_eq!(served.get("/run/a").status, 200);
}

#[test]
fn a_link_out_of_the_folder_is_no_run() {
    use std::os::unix::fs::symlink;
    let outside = folder();
    let dir = outside.path().join("runs");
    let real = write_run(&dir.join("a"));
    let target = outside.path().join("pcpo-001");
    let _lock = live(&target);
    symlink(&target, dir.join("link")).unwrap();
    symlink(&real, dir.join("again")).unwrap();
    for (run, file) in [("metrics", "metrics.jsonl"), ("settings", "settings.toml"), ("g", "grids")]
    {
        let run = write_run(&dir.join(run));
        let _ = std::fs::remove_dir_all(run.join(file));
        let _ = std::fs::remove_file(run.join(file));
        symlink(target.join(file), run.join(file)).unwrap();
    }
    // Outside, but with files that lead back inside.
    let back = outside.path().join("back");
    std::fs::create_dir(&back).unwrap();
    for file in ["metrics.jsonl", "settings.toml"] {
        symlink(real.join(file), back.join(file)).unwrap();
    }
    symlink(&back, dir.join("back")).unwrap();
    let served = Served::new(&dir, &[]);
    let list = served.get("/").body;
    assert_eq!(list.matches("<a href=\"/run/").count(), 2, "{list}");
    for name in ["link", "metrics", "settings", "g", "back"] {
        assert_eq!(served.get(&format!("/run/{name}")).status, 404, "{name}");
        assert_eq!(served.post(&format!("/run/{name}/stop")).status, 404, "{name}");
    }
    assert_eq!(served.get("/run/again").status, 200, "a link that stays inside");
    assert!(!target.join("control").exists());
    // A run whose control leads elsewhere.
    let _alive = live(&real);
    std::fs::create_dir(outside.path().join("elsewhere")).unwrap();
    symlink(outside.path().join("elsewhere"), real.join("control")).unwrap();
    let stop = served.post("/run/a/stop");
    assert!(stop.status == 500 && stop.body.contains("leads out"), "{}", stop.body);
    assert!(asked(&real).is_empty());
}

#[test]
fn wrong_methods_and_huge_requests_are_refused() {
    let dir = folder();
    let served = Served::new(dir.path(), &[]);
    for method in ["HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"] {
        for path in ["/", "/run/pcpo-001", "/run/pcpo-001/stop"] {
            let reply = served.ask(method, path, &[]);
            let allowed = if path.ends_with("stop") { "post" } else { "get" };
            assert_eq!((reply.status, reply.header("allow")), (405, Some(allowed)), "{method}");
        }
    }
    assert_eq!(served.post("/run/pcpo-001").status, 405);
    assert_eq!(served.get("/run/pcpo-001/stop").status, 405);
    let big = format!("X-Big: {}", "a".repeat(1 << 20));
    assert!([0, 400, 431].contains(&served.ask("GET", "/", &[&big]).status));
    let long = served.get(&format!("/run/{}", "a".repeat(1 << 20)));
    assert!([0, 400, 404, 414, 431].contains(&long.status), "{}", long.status);
    let lines: Vec<String> = (0..1000).map(|i| format!("X-{i}: 1")).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    assert!([0, 400, 431].contains(&served.ask("GET", "/", &lines).status));
    for length in ["Content-Length: 1000000000", "Transfer-Encoding: chunked"] {
        let reply = served.ask("POST", "/run/pcpo-001/stop", &["X-Pcpo: 1", length]);
        assert_eq!(reply.status, 413, "{length}");
    }
    for nonsense in ["\0\0\0\0\r\n\r\n", "GET\r\n\r\n", "\x16\x03\x01\x02\r\n\r\n"] {
        assert!([0, 400].contains(&served.raw(nonsense).status), "{nonsense:?}");
    }
    assert_eq!(served.get("/").status, 200);
}

#[test]
fn a_slow_client_keeps_nobody_waiting() {
    let dir = folder();
    let served = Served::new(dir.path(), &[]);
    let slow: Vec<TcpStream> = (0..20)
        .map(|_| {
            let mut stream = served.connect();
            stream.write_all(b"GET / HTTP/1.1\r\nHost: 127").unwrap();
            stream
        })
        .collect();
    let begin = Instant::now();
    assert_eq!(served.get("/").status, 200);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let mut first = &slow[0];
    first.write_all(format!(".0.0.1:{}\r\n\r\n", served.port).as_bytes()).unwrap();
    let mut answer = String::new();
    first.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
