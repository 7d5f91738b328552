//! Links in a checkpoint's folder, and the permissions of the files that are copied along.

use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::json;

use super::*;

/// Writes a checkpoint of one file of weights, with a configuration.
fn folder(dir: &Path, step: u64) {
    fs::create_dir_all(dir).unwrap();
    save(&dir.join("model.safetensors"), &model(step), &[]);
    fs::write(dir.join("config.json"), "{}").unwrap();
}

/// Averages two checkpoints into `average` beside them, and returns the error.
fn average(temp: &Path, follow: bool) -> Result<(), String> {
    let checkpoints = Checkpoints::open(&[temp.join("step-1"), temp.join("step-2")], None).unwrap();
    let checkpoints = checkpoints.follow_links(follow);
    let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
    let written = checkpoints.write(&[(&merge, &temp.join("average"))], &WriteOptions::default());
    written.map(drop).map_err(|error| error.to_string())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Two checkpoints, and a file beside them that only its owner may read.
fn checkpoints_and_secret() -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    folder(&temp.path().join("step-1"), 1);
    folder(&temp.path().join("step-2"), 2);
    let secret = temp.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key.json"), r#""key""#).unwrap();
    fs::set_permissions(secret.join("key.json"), fs::Permissions::from_mode(0o600)).unwrap();
    (temp, secret)
}

#[test]
fn links_out_of_the_folder_are_refused_and_nothing_is_written() {
    for name in ["config.json", "tokenizer.json", "merges.txt", "modeling_own.py", "modules.json"] {
        let (temp, secret) = checkpoints_and_secret();
        let link = temp.path().join("step-2").join(name);
        let _ = fs::remove_file(&link);
        symlink("../secret/key.json", &link).unwrap();
        let text = average(temp.path(), false).unwrap_err();
        assert!(text.contains(&format!("step-2/{name}: a link leads to")) && text.contains("--follow-links"), "{text}");
        assert!(text.contains(secret.canonicalize().unwrap().join("key.json").to_str().unwrap()), "{text}");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 3, "nothing is left of {name}");
        average(temp.path(), true).unwrap();
        let copy = temp.path().join("average").join(name);
        assert_eq!((fs::read_to_string(&copy).unwrap().as_str(), mode(&copy)), (r#""key""#, 0o600), "{name}");
    }
}

#[test]
fn folders_of_modules_and_indices_are_not_links_out_of_the_folder() {
    let (temp, secret) = checkpoints_and_secret();
    let dir = temp.path().join("step-2");
    fs::write(dir.join("modules.json"), json!([{"path": "1_Pooling"}]).to_string()).unwrap();
    symlink(&secret, dir.join("1_Pooling")).unwrap();
    let text = average(temp.path(), false).unwrap_err();
    assert!(text.contains("1_Pooling/key.json: a link leads to"), "{text}");
    average(temp.path(), true).unwrap();
    assert_eq!(mode(&temp.path().join("average/1_Pooling/key.json")), 0o600);

    let (temp, secret) = checkpoints_and_secret();
    let dir = temp.path().join("step-2");
    let tensors = model(2);
    let map: HashMap<&str, &str> = tensors.iter().map(|(name, _)| (*name, "weights.safetensors")).collect();
    let index = json!({"metadata": {"private": "notes"}, "weight_map": map});
    fs::rename(dir.join("model.safetensors"), dir.join("weights.safetensors")).unwrap();
    fs::write(secret.join("key.json"), index.to_string()).unwrap();
    symlink(secret.join("key.json"), dir.join("model.safetensors.index.json")).unwrap();
    let text = average(temp.path(), false).unwrap_err();
    assert!(text.contains("model.safetensors.index.json: a link leads to"), "{text}");
    average(temp.path(), true).unwrap();
    assert_eq!(mode(&temp.path().join("average/model.safetensors.index.json")), 0o600);
}

#[test]
fn copied_files_keep_their_permissions_within_the_umask() {
    let (temp, _) = checkpoints_and_secret();
    let dir = temp.path().join("step-2");
    let plain = mode(&dir.join("config.json"));
    for (name, mode) in [("config.json", 0o600), ("tokenizer.json", 0o666), ("merges.txt", 0o755), ("vocab.txt", 0o440)]
    {
        fs::write(dir.join(name), "{}").unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    average(temp.path(), false).unwrap();
    let out = temp.path().join("average");
    for (name, expected) in
        [("config.json", 0o600), ("tokenizer.json", 0o666), ("merges.txt", 0o644), ("vocab.txt", 0o440)]
    {
        assert_eq!(mode(&out.join(name)), expected & plain, "{name}");
    }
    assert_eq!(mode(&out.join("model.safetensors")), plain);
}

#[test]
fn links_within_the_folder_and_links_to_folders_are_followed() {
    let (temp, _) = checkpoints_and_secret();
    let dir = temp.path().join("step-2");
    fs::create_dir(dir.join("shared")).unwrap();
    fs::write(dir.join("shared/words"), "words").unwrap();
    symlink("shared/words", dir.join("vocab.txt")).unwrap();
    // The user named this link.
    fs::rename(&dir, temp.path().join("elsewhere")).unwrap();
    symlink("elsewhere", &dir).unwrap();
    average(temp.path(), false).unwrap();
    assert_eq!(fs::read_to_string(temp.path().join("average/vocab.txt")).unwrap(), "words");
    // A link that leads nowhere is not left out in silence.
    fs::remove_dir_all(temp.path().join("average")).unwrap();
    fs::remove_file(dir.join("shared/words")).unwrap();
    let text = average(temp.path(), false).unwrap_err();
    assert!(text.contains("step-2/vocab.txt"), "{text}");
}

/// In Hugging Face's cache every file of a revision is a link to a blob of the same model.
#[test]
fn caches_of_hugging_face_are_averaged() {
    let temp = tempfile::tempdir().unwrap();
    let cache = temp.path().join("models--org--name");
    let blobs = cache.join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    for step in [1, 2] {
        let revision = cache.join(format!("snapshots/{step:040}"));
        folder(&revision, step);
        fs::create_dir(revision.join("text")).unwrap();
        fs::write(revision.join("modules.json"), json!([{"path": "text"}]).to_string()).unwrap();
        fs::write(revision.join("text/config.json"), "{}").unwrap();
        for (i, name) in ["model.safetensors", "config.json", "modules.json", "text/config.json"].iter().enumerate() {
            let file = revision.join(name);
            let blob = format!("{step}{i}");
            fs::rename(&file, blobs.join(&blob)).unwrap();
            let up = "../".repeat(2 + name.matches('/').count());
            symlink(format!("{up}blobs/{blob}"), file).unwrap();
        }
        symlink(&revision, temp.path().join(format!("step-{step}"))).unwrap();
    }
    average(temp.path(), false).unwrap();
    let out = temp.path().join("average");
    assert!(["model.safetensors", "config.json", "text/config.json"].iter().all(|name| out.join(name).is_file()));
    // Files of another model, and blobs that are themselves a link, are outside.
    let link = cache.join(format!("snapshots/{:040}/tokenizer.json", 2));
    let other = temp.path().join("models--org--other/blobs");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("30"), "{}").unwrap();
    symlink("../../../models--org--other/blobs/30", &link).unwrap();
    fs::remove_dir_all(&out).unwrap();
    assert!(average(temp.path(), false).unwrap_err().contains("tokenizer.json: a link leads to"));
    fs::remove_file(&link).unwrap();
    fs::rename(&blobs, temp.path().join("moved")).unwrap();
    symlink("../moved", &blobs).unwrap();
    assert!(average(temp.path(), false).unwrap_err().contains("config.json: a link leads to"));
}
