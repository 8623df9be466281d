//! README.md shows what the demo prints.

use carport_tests::registry::installed;
use carport_tests::{carport, demo};

/// Figures differ from run to run, and the GPU line from machine to machine.
fn shape(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| {
            if line
                .trim_start()
                .trim_start_matches(char::is_numeric)
                .trim_start()
                .starts_with("gpus ")
            {
                return "gpus".to_owned();
            }
            let mut shape = String::new();
            let mut number = false;
            for c in line.trim_end().chars() {
                let digit = c.is_ascii_digit() || (number && c == '.');
                if !digit {
                    shape.push(c);
                } else if !number {
                    shape.push('#');
                }
                number = digit;
            }
            shape
        })
        .collect()
}

#[tokio::test]
async fn the_demo_works_and_prints_what_the_readme_shows() {
    if !rustix::process::geteuid().is_root() || !installed("docker-registry") {
        eprintln!("SKIPPED: the demo needs root and docker-registry");
        return;
    }
    let mut printed = Vec::new();
    demo::run(carport::binary(), &mut printed).await.unwrap();
    let printed = String::from_utf8(printed).unwrap();

    let readme = std::fs::read_to_string(carport::workspace().join("README.md")).unwrap();
    let (_, shown) =
        readme.split_once("`make demo` prints:\n\n```text\n").expect("a block of output");
    let (shown, _) = shown.split_once("```\n").expect("its end");
    assert_eq!(
        shape(shown),
        shape(&printed),
        "README.md shows:\n{shown}\nthe demo prints:\n{printed}"
    );
}

#[test]
fn the_two_commands_stand_first() {
    let readme = std::fs::read_to_string(carport::workspace().join("README.md")).unwrap();
    let first = readme.find("make demo").expect("make demo");
    let second = readme.find("make test").expect("make test");
    assert!(first < 1200 && second < 1200, "{first}, {second}");
    let makefile = std::fs::read_to_string(carport::workspace().join("Makefile")).unwrap();
    for target in ["demo:", "test:", "lint:", "bench:"] {
        assert!(makefile.contains(&format!("\n{target}")), "{target}");
    }
}
