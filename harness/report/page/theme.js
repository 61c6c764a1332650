"use strict";
// The theme: what the system prefers, until the reader chooses; the choice is kept where the browser allows it.
document.documentElement.classList.add("js");
{
  const root = document.documentElement;
  let kept = null;
  try { kept = localStorage.getItem("epsbench-theme"); } catch { kept = null; } // storage may be forbidden for files
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
}
addEventListener("DOMContentLoaded", () => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  function label() {
    theme.textContent = dark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Use the ${dark() ? "light" : "dark"} theme`);
  }
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("epsbench-theme", root.dataset.theme); } catch { label(); } // kept for this page only
    label();
  });
  prefersDark.addEventListener("change", label);
  label();
  theme.hidden = false;
});
