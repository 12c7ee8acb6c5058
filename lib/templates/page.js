"use strict";
(function () {
  var root = document.documentElement;

  // Theme: system, light, dark. Where storage is closed (some file:// pages) it lasts for the visit.
  var button = document.querySelector(".theme"), themes = ["system", "light", "dark"], theme = "system";
  try { theme = localStorage.getItem("workbook-theme") || "system"; } catch (e) { theme = "system"; }
  function show() {
    root.style.colorScheme = theme === "system" ? "" : theme;
    button.textContent = "Theme: " + theme;
  }
  if (button) {
    if (themes.indexOf(theme) < 0) { theme = "system"; }
    button.hidden = false;
    show();
    button.addEventListener("click", function () {
      theme = themes[(themes.indexOf(theme) + 1) % 3];
      try { localStorage.setItem("workbook-theme", theme); } catch (e) { /* lasts for the visit */ }
      show();
    });
  }

  // Sorting: a button in each sortable header; numbers by data-value; what is missing comes last.
  function value(row, column) {
    var cell = row.cells[column];
    if (!cell) { return ""; }
    return cell.hasAttribute("data-value") ? cell.getAttribute("data-value") : cell.textContent.trim();
  }
  function number(text) {
    var plain = text.replace(/,/g, "").replace(/[\u2212\u2013]/g, "-");
    return plain !== "" && isFinite(plain) ? Number(plain) : null;
  }
  function missing(text) { return /^(|-|\u2013|\u2014|None|nan)$/i.test(text); }
  function compare(a, b) {
    var x = number(a), y = number(b);
    if (x !== null && y !== null) { return x - y; }
    if (x !== null || y !== null) { return x !== null ? -1 : 1; }
    return a.localeCompare(b);
  }
  function sort(table, header) {
    var column = Number(header.getAttribute("data-col"));
    var down = header.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th[aria-sort]").forEach(function (th) { th.removeAttribute("aria-sort"); });
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    var rows = Array.prototype.slice.call(table.tBodies[0].rows);
    rows.sort(function (r, s) {
      var a = value(r, column), b = value(s, column);
      if (missing(a) || missing(b)) { return missing(a) - missing(b); }
      return down ? compare(b, a) : compare(a, b);
    });
    rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    if (!table.tBodies.length || table.tBodies[0].rows.length < 2) { return; }
    table.querySelectorAll("th[data-col]").forEach(function (th) {
      var control = document.createElement("button");
      control.type = "button";
      control.className = "sort";
      while (th.firstChild) { control.appendChild(th.firstChild); }
      th.appendChild(control);
      control.addEventListener("click", function () { sort(table, th); });
    });
  });

  // Contents start closed on a narrow screen; a link into a closed part opens it.
  var toc = document.querySelector(".toc > details");
  if (toc && window.matchMedia("(max-width: 65.99rem)").matches) { toc.open = false; }
  function reveal() {
    var target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (var at = target; at; at = at.parentElement) { if (at.tagName === "DETAILS") { at.open = true; } }
    if (target) { target.scrollIntoView(); }
  }
  window.addEventListener("hashchange", reveal);
  reveal();
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not(.code)").forEach(function (d) { d.open = true; });
  });
})();
