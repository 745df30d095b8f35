//! What may be missing on a machine, and the command lines that install it.

/// What the launcher needs and may find missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The standard library for the bare-metal target.
    Target,
    /// QEMU for x86_64.
    Qemu,
    /// UEFI for virtual machines.
    Firmware,
    /// What the `bootloader` crate builds its stages with.
    ImageTools,
}

impl Need {
    /// As it is called in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Target => "the Rust target x86_64-unknown-none",
            Self::Qemu => "QEMU (qemu-system-x86_64)",
            Self::Firmware => "UEFI for QEMU (OVMF)",
            Self::ImageTools => "the Rust components rust-src and llvm-tools",
        }
    }
}

/// What this machine can install with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Installers {
    /// Whether there is rustup.
    pub rustup: bool,
    /// The machine's package manager.
    pub packages: Option<PackageManager>,
    /// How a command becomes root.
    pub root: Root,
}

/// A program that installs packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackageManager {
    /// Debian and its kin.
    Apt,
    /// Fedora and its kin.
    Dnf,
    /// Arch and its kin.
    Pacman,
    /// macOS, and Linux too.
    Brew,
}

/// How a command becomes root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// It is root already.
    Already,
    /// By sudo, which may ask for a password.
    Sudo,
    /// By sudo, where nobody can be asked for a password.
    SudoUnasked,
    /// It cannot.
    Never,
    /// It must not: the package manager refuses to run as root.
    NotNeeded,
}

impl PackageManager {
    /// The one that `has` finds on this machine. The system's own goes before brew.
    pub fn find(has: impl Fn(&str) -> bool) -> Option<Self> {
        let known = [("apt-get", Self::Apt), ("dnf", Self::Dnf), ("pacman", Self::Pacman), ("brew", Self::Brew)];
        known.into_iter().find(|(program, _)| has(program)).map(|(_, manager)| manager)
    }

    fn package(self, need: Need) -> Option<&'static str> {
        match (need, self) {
            (Need::Qemu, Self::Apt | Self::Pacman) => Some("qemu-system-x86"),
            (Need::Qemu, Self::Dnf) => Some("qemu-system-x86-core"),
            // The firmware comes with QEMU.
            (Need::Qemu | Need::Firmware, Self::Brew) => Some("qemu"),
            (Need::Firmware, Self::Apt) => Some("ovmf"),
            (Need::Firmware, Self::Dnf | Self::Pacman) => Some("edk2-ovmf"),
            (Need::Target | Need::ImageTools, _) => None,
        }
    }

    /// The command lines that install `packages`, without the way to become root.
    fn commands(self, packages: &[&str]) -> Vec<Vec<String>> {
        let heads: &[&str] = match self {
            Self::Apt => &[
                "env DEBIAN_FRONTEND=noninteractive apt-get update",
                "env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends",
            ],
            Self::Dnf => &["dnf install --assumeyes"],
            Self::Pacman => &["pacman -Sy --needed --noconfirm"],
            Self::Brew => &["brew install"],
        };
        let mut commands: Vec<_> = heads.iter().map(|head| words(head)).collect();
        if let Some(install) = commands.last_mut() {
            install.extend(packages.iter().map(|&package| package.to_owned()));
        }
        commands
    }
}

impl Installers {
    /// The command lines that install `needs`; an error that says what to install where there is no way.
    pub fn plan(self, needs: &[Need]) -> Result<Vec<Vec<String>>, String> {
        let mut commands = Vec::new();
        let mut packages = Vec::new();
        let mut helpless = Vec::new();
        for &need in needs {
            let package = self.packages.and_then(|manager| manager.package(need));
            match (need, package) {
                (Need::Target, _) if self.rustup => commands.push(words("rustup target add x86_64-unknown-none")),
                (Need::ImageTools, _) if self.rustup => {
                    commands.push(words("rustup component add rust-src llvm-tools"))
                }
                (_, Some(package)) => packages.push(package),
                _ => helpless.push(need),
            }
        }
        packages.dedup();
        if !packages.is_empty() {
            commands.extend(self.packages.into_iter().flat_map(|manager| self.as_root(manager, &packages)));
        }
        if helpless.is_empty() && (packages.is_empty() || self.root != Root::Never) {
            return Ok(commands);
        }
        Err(advice(needs, &commands, &helpless))
    }

    /// What to do by hand where nothing may be installed from here.
    pub fn advice(self, needs: &[Need]) -> String {
        self.plan(needs).map_or_else(|advice| advice, |commands| advice(needs, &commands, &[]))
    }

    fn as_root(self, manager: PackageManager, packages: &[&str]) -> Vec<Vec<String>> {
        let prefix = match self.root {
            Root::Sudo => "sudo",
            Root::SudoUnasked => "sudo -n",
            Root::Already | Root::NotNeeded => "",
            // Nobody runs this line; it is advice.
            Root::Never => "sudo",
        };
        manager.commands(packages).into_iter().map(|command| [words(prefix), command].concat()).collect()
    }
}

/// One message about everything that is missing.
fn advice(needs: &[Need], commands: &[Vec<String>], helpless: &[Need]) -> String {
    let names: Vec<_> = needs.iter().map(|need| need.name()).collect();
    let commands = commands.iter().map(|command| format!("`{}`", command.join(" ")));
    let ways: Vec<_> = commands.chain(helpless.iter().map(|&need| by_hand(need).to_owned())).collect();
    format!("{} missing; install with {}", names.join(" and "), ways.join(", then "))
}

fn by_hand(need: Need) -> &'static str {
    match need {
        Need::Target => "rustup (https://rustup.rs), or your distribution's package of Rust's own sources (rust-src)",
        Need::Qemu => "QEMU (https://www.qemu.org/download)",
        Need::Firmware => "your distribution's OVMF or edk2",
        Need::ImageTools => "rustup (https://rustup.rs), which brings them",
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: Installers = Installers { rustup: true, packages: Some(PackageManager::Apt), root: Root::Already };

    fn plan(installers: Installers, needs: &[Need]) -> Vec<String> {
        installers.plan(needs).unwrap().iter().map(|command| command.join(" ")).collect()
    }

    #[test]
    fn each_package_manager_installs_its_own_way() {
        let needs = [Need::Qemu, Need::Firmware];
        let with = |manager, root| plan(Installers { rustup: false, packages: Some(manager), root }, &needs);
        assert_eq!(
            with(PackageManager::Apt, Root::Sudo),
            [
                "sudo env DEBIAN_FRONTEND=noninteractive apt-get update",
                "sudo env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends qemu-system-x86 ovmf",
            ]
        );
        assert_eq!(
            with(PackageManager::Dnf, Root::SudoUnasked),
            ["sudo -n dnf install --assumeyes qemu-system-x86-core edk2-ovmf"]
        );
        assert_eq!(
            with(PackageManager::Pacman, Root::Already),
            ["pacman -Sy --needed --noconfirm qemu-system-x86 edk2-ovmf"]
        );
        assert_eq!(with(PackageManager::Brew, Root::NotNeeded), ["brew install qemu"]);
    }

    #[test]
    fn rustup_brings_what_is_of_rust() {
        let commands = plan(DEBIAN, &[Need::Target, Need::ImageTools]);
        assert_eq!(commands, ["rustup target add x86_64-unknown-none", "rustup component add rust-src llvm-tools"]);
        assert_eq!(plan(DEBIAN, &[Need::Target, Need::Qemu]).len(), 3);
        assert!(plan(DEBIAN, &[]).is_empty());
    }

    #[test]
    fn where_there_is_no_way_one_line_says_what_to_install() {
        let told = Installers { rustup: false, packages: None, root: Root::Never }.plan(&[Need::Qemu]).unwrap_err();
        assert_eq!(told, "QEMU (qemu-system-x86_64) missing; install with QEMU (https://www.qemu.org/download)");
        let told = Installers { rustup: false, ..DEBIAN }.plan(&[Need::Target, Need::Qemu]).unwrap_err();
        assert!(told.contains("apt-get install") && told.contains("rust-src") && !told.contains('\n'), "{told}");
        let told = Installers { root: Root::Never, ..DEBIAN }.plan(&[Need::Qemu]).unwrap_err();
        assert!(told.contains("`sudo env DEBIAN_FRONTEND=noninteractive apt-get install"), "{told}");
        assert!(DEBIAN.advice(&[Need::Target]).ends_with("install with `rustup target add x86_64-unknown-none`"));
    }

    #[test]
    fn the_systems_own_package_manager_goes_first() {
        assert_eq!(PackageManager::find(|program| program == "brew"), Some(PackageManager::Brew));
        assert_eq!(PackageManager::find(|program| ["brew", "dnf"].contains(&program)), Some(PackageManager::Dnf));
        assert_eq!(PackageManager::find(|_| false), None);
    }
}
