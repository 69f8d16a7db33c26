//! The configuration of a job.

use std::any::Any;
use std::fs;
use std::path::Path;

use crate::algorithms::{ALGORITHMS, Algorithms, Entry};
use crate::config::{self, ConfigError, Earlier, Keys, Problem, Settings, folder_of};
use crate::driver::{AlgorithmSettings, MODEL_FOLDER};
use crate::rewards::{RewardSource, sources};
use crate::settings::{Common, words};

/// The configuration of a job: read from TOML, or built in Rust. The reference of all keys is `docs/config.md`.
///
/// ```
/// use rehearsal::{Config, algorithms::OnlineDpo, rewards::RuleSource};
///
/// let mut config = Config::new("runs/brief");
/// config.common.job.steps = 40;
/// let mut algorithm = OnlineDpo::default();
/// algorithm.online.rollout.completions_per_prompt = 4;
/// config.set_algorithm(algorithm).unwrap();
/// config.reward::<RuleSource>().unwrap().rules = vec!["length_window".into()];
/// config.check().unwrap();
/// ```
#[derive(Debug, Clone)]
pub struct Config {
    /// The sections that every job has.
    pub common: Common,
    algorithms: Algorithms,
    entry: Entry,
    /// Settings of the algorithm.
    pub algorithm: Box<dyn AlgorithmSettings>,
    /// Every source of rewards, configured or not, in the order in which their scores are added.
    pub rewards: Vec<Box<dyn RewardSource>>,
    /// Sections of the document that the job does not read, with their lines.
    unread: Vec<(String, usize)>,
}

impl Config {
    /// The default configuration of a job that works in `directory`: online DPO of the embedded model.
    pub fn new(directory: impl AsRef<Path>) -> Self {
        let mut config = Self::of(&Algorithms::default(), ALGORITHMS[0]);
        config.common.job.directory = directory.as_ref().into();
        config
    }

    fn of(algorithms: &Algorithms, entry: Entry) -> Self {
        let (common, algorithms) = (Common::default(), algorithms.clone());
        let unread = Vec::new();
        Self { common, algorithms, entry, algorithm: (entry.settings)(), rewards: sources(), unread }
    }

    /// What is strange about the document and yet no error: sections that its algorithm does not read.
    pub fn warnings(&self) -> Vec<String> {
        let name = self.algorithm_name();
        let warning = |(section, line): &(String, usize)| {
            format!("line {line}: `[{section}]` has no effect: the algorithm `{name}` does not read it")
        };
        self.unread.iter().map(warning).collect()
    }

    /// The algorithms that it may name.
    pub fn algorithms(&self) -> &Algorithms {
        &self.algorithms
    }

    /// Name of the algorithm.
    pub fn algorithm_name(&self) -> &'static str {
        self.entry.name
    }

    /// Sets the algorithm by its settings.
    ///
    /// # Errors
    ///
    /// If no algorithm of [`Config::algorithms`] has settings of that type.
    pub fn set_algorithm<S: AlgorithmSettings>(&mut self, settings: S) -> Result<(), ConfigError> {
        let unknown = || {
            let message = format!(
                "no algorithm has settings of the type `{}`; add it by `Algorithms::with`",
                std::any::type_name::<S>()
            );
            ConfigError::new(vec![Problem { line: 0, message }])
        };
        self.entry = self.algorithms.of(&settings).ok_or_else(unknown)?;
        self.algorithm = Box::new(settings);
        Ok(())
    }

    /// Settings of a source of rewards by their type; `None` if there is no such source.
    pub fn reward<T: 'static>(&mut self) -> Option<&mut T> {
        self.rewards.iter_mut().find_map(|source| (&mut **source as &mut dyn Any).downcast_mut())
    }

    /// Settings of the algorithm by their type; `None` if it is another.
    pub fn algorithm_as<T: 'static>(&self) -> Option<&T> {
        (&*self.algorithm as &dyn Any).downcast_ref()
    }

    /// Settings of the algorithm by their type, to be changed; `None` if it is another.
    pub fn algorithm_as_mut<T: 'static>(&mut self) -> Option<&mut T> {
        (&mut *self.algorithm as &mut dyn Any).downcast_mut()
    }

    /// Checks every value by the ranges and rules that hold for files.
    ///
    /// # Errors
    ///
    /// All problems at once, each naming its key.
    pub fn check(&self) -> Result<(), ConfigError> {
        let problems = self.visited().problems;
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::new(problems)) }
    }

    /// The configuration as TOML. Reading it gives the same configuration; paths are written as they are held.
    pub fn to_toml(&self) -> String {
        self.visited().toml()
    }

    /// A visit of every key that this job uses.
    pub(crate) fn visited(&self) -> Keys {
        let mut keys = Keys::default();
        self.clone().visit(&mut keys);
        keys
    }

    /// A visit of every key of the job's algorithm, and of sources of rewards if it needs one.
    #[cfg(feature = "cli")]
    pub(crate) fn used(&self) -> Keys {
        let (mut config, mut keys) = (self.clone(), Keys::default());
        config.visit_algorithm(&mut keys);
        config.common.visit(&mut keys);
        config.algorithm.visit(&mut keys);
        if config.algorithm.needs_reward() {
            config.rewards.iter_mut().for_each(|source| source.visit(&mut keys));
        }
        keys
    }

    /// What a resumed job must have in common: name and value of every setting that changes its results, in the order of
    /// names. Sections that the job does not use are left out.
    pub(crate) fn fingerprint(&self) -> Vec<(String, String)> {
        let mut config = self.clone();
        let mut keys = Keys::default();
        config.visit_algorithm(&mut keys);
        config.common.visit(&mut keys);
        config.algorithm.visit(&mut keys);
        let mut sources = Vec::new();
        if config.algorithm.needs_reward() {
            for source in config.rewards.iter_mut().filter(|source| source.is_configured()) {
                sources.push(source.name());
                source.visit(&mut keys);
            }
        }
        let mut lines = keys.fingerprint();
        lines.retain(|(name, _)| self.common.lora.enabled() || !name.starts_with("lora."));
        lines.push(("sources of rewards".into(), sources.join(", ")));
        lines
    }

    /// The fingerprint of the same algorithm with every key at its default.
    pub(crate) fn default_fingerprint(&self) -> Vec<(String, String)> {
        Self::of(&self.algorithms, self.entry).fingerprint()
    }

    fn visit(&mut self, keys: &mut Keys) {
        self.visit_algorithm(keys);
        self.common.visit(keys);
        self.algorithm.visit(keys);
        self.rewards.iter_mut().for_each(|source| source.visit(keys));
        self.algorithm.check(&self.common, keys);
    }

    /// `job.algorithm`; a change brings the algorithm's default settings.
    fn visit_algorithm(&mut self, keys: &mut Keys) {
        let choices: Vec<(&'static str, &'static str)> =
            self.algorithms.entries().iter().map(|e| (e.name, e.name)).collect();
        let mut name = self.entry.name;
        let help = "The algorithm; docs/methods.md describes each.";
        let hint = |given: &str| words::hint(words::ALGORITHMS, given);
        keys.section("job").choice_or_hint("algorithm", &mut name, &choices, help, &hint);
        if let Some(entry) = self.algorithms.named(name).filter(|entry| entry.name != self.entry.name) {
            (self.entry, self.algorithm) = (entry, (entry.settings)());
        }
    }

    /// Reads a file; paths in it are relative to its folder.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Algorithms::default().load(path)
    }

    /// Reads a document of one job; paths in it are relative to `base`. All problems are reported at once.
    pub fn from_toml(source: &str, base: &Path) -> Result<Self, ConfigError> {
        Algorithms::default().from_toml(source, base)
    }

    /// Reads a document of one job, or of several that build on one another (`[[stage]]`).
    pub fn stages(source: &str, base: &Path) -> Result<Vec<Self>, ConfigError> {
        Algorithms::default().stages(source, base)
    }

    /// Visits the sections of the other algorithms, so that they are known and their values are checked too.
    fn visit_others(&self, keys: &mut Keys) {
        for entry in self.algorithms.entries().iter().filter(|entry| entry.name != self.entry.name) {
            (entry.settings)().visit(keys);
        }
    }

    /// Every key of every section.
    fn all_keys() -> Keys {
        let mut keys = Keys::default();
        let mut config = Self::of(&Algorithms::default(), ALGORITHMS[0]);
        config.visit(&mut keys);
        config.visit_others(&mut keys);
        keys
    }

    /// The reference of all keys as Markdown: `docs/config.md`.
    pub fn reference() -> String {
        config::markdown(&Self::all_keys())
    }

    /// A JSON schema of the document: `docs/config.schema.json`.
    pub fn json_schema() -> serde_json::Value {
        config::json_schema(&Self::all_keys())
    }
}

/// Reading of configurations, whose `job.algorithm` may be any of these.
impl Algorithms {
    /// The default configuration of a job that works in `directory`.
    ///
    /// # Errors
    ///
    /// If there is no algorithm of that name.
    pub fn config(&self, algorithm: &str, directory: impl AsRef<Path>) -> Result<Config, ConfigError> {
        let unknown = || {
            let names: Vec<_> = self.entries().iter().map(|entry| entry.name).collect();
            let message = format!("there is no algorithm `{algorithm}`; there are {}", names.join(", "));
            ConfigError::new(vec![Problem { line: 0, message }])
        };
        let mut config = Config::of(self, self.named(algorithm).ok_or_else(unknown)?);
        config.common.job.directory = directory.as_ref().into();
        Ok(config)
    }

    /// As [`Config::load`].
    pub fn load(&self, path: &Path) -> Result<Config, ConfigError> {
        let source = fs::read_to_string(path).map_err(|e| {
            let problem = Problem { line: 0, message: format!("cannot be read: {e}") };
            ConfigError::new(vec![problem]).in_file(path)
        })?;
        self.from_toml(&source, &folder_of(path)).map_err(|e| e.in_file(path))
    }

    /// As [`Config::from_toml`].
    pub fn from_toml(&self, source: &str, base: &Path) -> Result<Config, ConfigError> {
        let mut stages = self.stages(source, base)?;
        match stages.len() {
            1 => Ok(stages.remove(0)),
            n => {
                let message = format!("has {n} stages; run it as a chain");
                Err(ConfigError::new(vec![Problem { line: 0, message }]))
            }
        }
    }

    /// As [`Config::stages`].
    pub fn stages(&self, source: &str, base: &Path) -> Result<Vec<Config>, ConfigError> {
        let (configs, problems) = self.read(source, base)?;
        if problems.is_empty() { Ok(configs) } else { Err(ConfigError::new(problems)) }
    }

    /// The stages of a document, as far as they can be read, and its problems.
    pub(super) fn read(&self, source: &str, base: &Path) -> Result<(Vec<Config>, Vec<Problem>), ConfigError> {
        let mut configs: Vec<Config> = Vec::new();
        let mut earlier = Earlier::default();
        let mut problems = Vec::new();
        for stage in config::split(source).map_err(ConfigError::new)? {
            let mut keys = Keys::reading(stage.document, base, earlier.clone());
            let mut config = Config::of(self, self.entries()[0]);
            config.visit(&mut keys);
            let mut unread = keys.unvisited_sections();
            config.visit_others(&mut keys);
            keys.report_unknown(|key| words::hint(words::KEYS, key));
            if !config.algorithm.needs_reward() {
                let mut of_rewards = Keys::default();
                sources().iter_mut().for_each(|source| source.visit(&mut of_rewards));
                let names: Vec<_> = of_rewards.by_section().into_iter().map(|(section, _)| section).collect();
                unread.extend(keys.sections().into_iter().filter(|(section, _)| names.contains(&section.as_str())));
            }
            config.unread = unread;
            problems.extend(keys.problems);
            if let Some(name) = stage.name {
                config.common.job.directory.push(&name);
                let model = config.common.job.directory.join(MODEL_FOLDER);
                earlier.add(&name, model, config.algorithm.trains_reward_model());
            }
            configs.push(config);
        }
        // A section that stages share is for those that read it.
        if let [first, others @ ..] = configs.as_mut_slice() {
            let all = |section: &(String, usize)| others.iter().all(|other| other.unread.contains(section));
            first.unread.retain(all);
            others.iter_mut().for_each(|other| other.unread.clear());
        }
        Ok((configs, problems))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::{Ppo, Sft};

    #[test]
    fn what_is_written_is_read_as_the_same() {
        for entry in ALGORITHMS {
            let mut config = Config::of(&Algorithms::default(), *entry);
            config.common.job.directory = "/runs/x".into();
            config.common.optimizer.learning_rate = 3e-4;
            let toml = config.to_toml();
            let root = Path::new("/");
            // An offline algorithm's data is missing here, which is the only problem it may have.
            match Config::from_toml(&toml, root) {
                Ok(read) => {
                    assert_eq!(read.to_toml(), toml);
                    assert_eq!(read.fingerprint(), config.fingerprint());
                }
                Err(e) => assert!(
                    e.problems.iter().all(|p| p.message.contains("exceeds") || p.message.contains("data.train")),
                    "{e}"
                ),
            }
        }
    }

    #[test]
    fn a_configuration_built_in_rust_is_checked_as_a_file_is() {
        let mut config = Config::new("/runs/x");
        config.common.optimizer.learning_rate = f64::NAN;
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("`optimizer.learning_rate` = NaN must be above 0"), "{error}");
        config.common.optimizer.learning_rate = 1e-5;
        config.check().unwrap();
        config.set_algorithm(Sft::default()).unwrap();
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("`data.train` is missing"), "{error}");
        let mut ppo = Ppo::default();
        ppo.online.rollout.completions_per_prompt = 0;
        config.set_algorithm(ppo).unwrap();
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("`rollout.completions_per_prompt` = 0 must be 1 to 256"), "{error}");
        let error = Algorithms::default().config("pqo", "x").unwrap_err().to_string();
        assert!(error.contains("there is no algorithm `pqo`; there are online_dpo, sft"), "{error}");
    }

    #[test]
    fn the_fingerprint_holds_what_changes_results_and_nothing_else() {
        let read = |toml: &str| {
            let source = format!("[job]\ndirectory = \"x\"\n{toml}");
            Config::from_toml(&source, Path::new("/")).unwrap().fingerprint()
        };
        let plain = read("[reward]\nrules = [\"distinct_words\"]\n");
        let same = [
            "[rollout]\nbatch = 3\n[placement]\nthreads = 1\n[reward]\nrules = [\"distinct_words\"]\n",
            "[judge]\ntemplate = \"brief\"\n[lora]\nalpha = 3\n[reward]\nrules = [\"distinct_words\"]\n",
        ];
        for toml in same {
            assert_eq!(read(toml), plain, "{toml}");
        }
        let others = [
            "[reward]\nrules = [\"distinct_words\"]\n[scorer]\nurl = \"http://localhost\"\n",
            "[reward]\nrules = [\"distinct_words\"]\n[people]\nlisten = \"127.0.0.1:1\"\n",
            "[reward]\nrules = [\"distinct_words\"]\n[lora]\nrank = 2\n",
            "[reward]\nrules = [\"distinct_words\"]\n[rollout]\ntemperature = 0.5\n",
        ];
        for toml in others {
            assert_ne!(read(toml), plain, "{toml}");
        }
    }

    #[test]
    fn a_stage_takes_the_reward_model_before_it_unless_it_names_another_reward() {
        let chain = |reward: &str| {
            let source = format!(
                "[job]\ndirectory = \"x\"\n[data]\ntrain = [\".\"]\n[reward]\nrules = [\"distinct_words\"]\n\
                 [[stage]]\nalgorithm = \"reward_model\"\n[[stage]]\nalgorithm = \"ppo\"\n{reward}"
            );
            let mut stages = Config::stages(&source, Path::new("/")).unwrap();
            stages[1].reward::<crate::rewards::RewardModelSource>().unwrap().models.len()
        };
        assert_eq!(chain(""), 0);
        assert_eq!(chain("[stage.reward]\nrules = []\n"), 1);
        assert_eq!(chain("[stage.reward]\nrules = []\nmodels = [\"embedded\"]\n"), 1);
    }
}
