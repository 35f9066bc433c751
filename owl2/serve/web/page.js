// Run once when the page is there; gives the language. What was chosen before comes first, else the browser's.
() => {
  window.owl2 = {
    // gradio carries both languages; the module that shows them has a name with a hash in it.
    speak: async (language) => {
      const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
      const core = loaded.find((name) => /\/assets\/core-[^/]*\.js$/.test(name));
      await (await import(core)).changeLocale(language === "zh" ? "zh-CN" : "en");
    },
    choose: (language) => { localStorage.setItem("owl2-language", language); window.owl2.speak(language); },
    theme: () => {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("owl2-theme", dark ? "dark" : "light");
    },
  };
  const theme = localStorage.getItem("owl2-theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");
  // An image may be dropped anywhere on the page, not on the box alone.
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
  const known = localStorage.getItem("owl2-language");
  const language = known || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
  window.owl2.speak(language);
  return language;
}
