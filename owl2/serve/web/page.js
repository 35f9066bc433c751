// Runs when the page is loaded. Returns the language: the saved choice, else that of the browser.
() => {
  window.owl2 = {
    // gradio has both languages; the name of the module that switches them contains a hash.
    setLanguage: async (language) => {
      const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
      const core = loaded.find((name) => /\/assets\/core-[^/]*\.js$/.test(name));
      await (await import(core)).changeLocale(language === "zh" ? "zh-CN" : "en");
    },
    choose: (language) => { localStorage.setItem("owl2-language", language); window.owl2.setLanguage(language); },
    theme: () => {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("owl2-theme", dark ? "dark" : "light");
    },
  };
  const theme = localStorage.getItem("owl2-theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");
  // Images can be dropped anywhere on the page, not only on the text box.
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    const input = document.querySelector("#box input[type=file]");
    if (!input || !event.dataTransfer?.files.length || event.target.closest("#box")) return;
    event.preventDefault();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  const icon = document.createElement("link");
  icon.rel = "icon";
  icon.href = "data:image/svg+xml," + encodeURIComponent(document.querySelector("#brand svg").outerHTML);
  document.head.append(icon);
  const saved = localStorage.getItem("owl2-language");
  const language = saved || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
  window.owl2.setLanguage(language);
  return language;
}
