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

  // Filtering: long tables get a field; a row stays if it holds every word.
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var body = table.tBodies[0], rows = body ? Array.prototype.slice.call(body.rows) : [];
    var region = table.closest(".scroll");
    if (rows.length < 8 || !region) { return; }
    var box = document.createElement("p"), field = document.createElement("input");
    var count = document.createElement("span");
    var names = table.getAttribute("aria-labelledby") || region.getAttribute("aria-labelledby");
    var caption = names && document.getElementById(names);
    var title = caption ? (caption.querySelector("b") || caption).textContent : region.getAttribute("aria-label");
    box.className = "filter";
    field.type = "search";
    field.placeholder = "Filter rows";
    field.autocomplete = "off";
    field.setAttribute("aria-label", "Filter rows: " + title);
    count.setAttribute("role", "status");
    box.append(field, count);
    region.before(box);
    field.addEventListener("input", function () {
      var words = field.value.toLowerCase().split(/\s+/).filter(Boolean), left = 0;
      rows.forEach(function (row) {
        var text = row.textContent.toLowerCase();
        text += " " + text.replace(/(\d),(?=\d{3})/g, "$1");
        row.hidden = !words.every(function (word) { return text.indexOf(word) >= 0; });
        left += row.hidden ? 0 : 1;
      });
      count.textContent = words.length ? left + " of " + rows.length + " rows" : "";
    });
  });

  // A number opens what it rests on. One stop of the Tab key a table; arrows move between numbers.
  function details() {
    var panel = document.createElement("div");
    if (!panel.showPopover) { return; }
    panel.className = "about";
    panel.tabIndex = -1;
    panel.setAttribute("popover", "auto");
    panel.setAttribute("role", "dialog");
    panel.setAttribute("aria-label", "What this number rests on");
    document.body.appendChild(panel);

    function line(list, name, content) {
      if (!content) { return; }
      var dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.append(content);
      list.append(dt, dd);
    }
    function records(ids) {
      var all = document.createElement("span");
      ids.split(" ").filter(Boolean).forEach(function (id) {
        if (!document.getElementById("record-" + id)) { return; }
        var link = document.createElement("a");
        link.href = "#record-" + id;
        link.textContent = id;
        link.addEventListener("click", function () {
          panel.hidePopover();
          document.getElementById("record-" + id).hidden = false;
          setTimeout(reveal, 0);
        });
        all.append(all.firstChild ? ", " : "", link);
      });
      return all.firstChild ? all : "";
    }
    function heading(table, column) {
      var above = 0, names = [];
      Array.prototype.some.call(table.tHead.rows[0].cells, function (th) {
        above += th.colSpan;
        return above > column && names.push(th.textContent);
      });
      var own = table.tHead.rows.length > 1 && table.querySelector('th[data-col="' + column + '"]');
      return names.concat(own ? own.textContent : []).join(", ");
    }
    function open(control) {
      var cell = control.closest("td"), data = cell.dataset, list = document.createElement("dl");
      var close = document.createElement("button"), place = control.getBoundingClientRect();
      var name = cell.parentElement.querySelector("th");
      line(list, "number", (name ? name.textContent + ": " : "") + heading(cell.closest("table"), cell.cellIndex));
      line(list, "value", data.value);
      line(list, (data.level || "95 %") + " interval", data.low || data.high ? (data.low || "\u2026") + " to " + (data.high || "\u2026") : "none: " + (data.reason || "one reading"));
      line(list, "n", data.n);
      line(list, "method", data.method);
      line(list, "set-up", data.setup);
      line(list, data.records && data.records.indexOf(" ") > 0 ? "records" : "record", records(data.records || ""));
      close.type = "button";
      close.textContent = "Close";
      close.addEventListener("click", function () { panel.hidePopover(); });
      panel.replaceChildren(list, close);
      panel.showPopover();
      if (window.matchMedia("(min-width: 40.01rem)").matches) {
        var left = Math.min(place.left, root.clientWidth - panel.offsetWidth - 8);
        panel.style.left = Math.max(8, left) + window.scrollX + "px";
        panel.style.top = place.bottom + 6 + window.scrollY + "px";
      } else { panel.style.left = panel.style.top = ""; }
      panel.focus();
    }
    function step(control, key) {
      var row = control.closest("tr"), at = control.closest("td").cellIndex, along = "nextElementSibling";
      if (key === "ArrowLeft" || key === "ArrowUp") { along = "previousElementSibling"; }
      if (key === "ArrowLeft" || key === "ArrowRight") {
        for (var cell = control.closest("td")[along]; cell; cell = cell[along]) {
          if (cell.querySelector(".open")) { return cell.querySelector(".open"); }
        }
        return null;
      }
      for (row = row[along]; row; row = row[along]) {
        var found = !row.hidden && row.cells[at] && row.cells[at].querySelector(".open");
        if (found) { return found; }
      }
      return null;
    }
    document.querySelectorAll("table.data").forEach(function (table) {
      var stop = null;
      table.querySelectorAll("td[data-n] > .v").forEach(function (shown) {
        var control = document.createElement("button");
        control.type = "button";
        control.className = "v open";
        control.tabIndex = stop ? -1 : 0;
        control.setAttribute("aria-haspopup", "dialog");
        control.append.apply(control, shown.childNodes);
        shown.replaceWith(control);
        stop = stop || control;
      });
      table.addEventListener("click", function (event) {
        var control = event.target.closest(".open");
        if (control) { open(control); }
      });
      table.addEventListener("focusin", function (event) {
        if (!event.target.matches(".open")) { return; }
        stop.tabIndex = -1;
        stop = event.target;
        stop.tabIndex = 0;
      });
      table.addEventListener("keydown", function (event) {
        var next = event.target.matches(".open") && /^Arrow/.test(event.key) && step(event.target, event.key);
        if (next) { event.preventDefault(); next.focus(); }
      });
    });
  }
  details();

  // Contents start closed on a narrow screen; a link into a closed part opens it.
  var toc = document.querySelector(".toc > details");
  if (toc && window.matchMedia("(max-width: 65.99rem)").matches) { toc.open = false; }
  function reveal() {
    var target = null;
    try { target = document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch (e) { target = null; }
    for (var at = target; at; at = at.parentElement) { if (at.tagName === "DETAILS") { at.open = true; } }
    if (target) { target.scrollIntoView(); }
  }
  window.addEventListener("hashchange", reveal);
  reveal();
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not(.code, .raw)").forEach(function (d) { d.open = true; });
  });
})();
